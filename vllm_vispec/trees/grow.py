"""Growing a draft tree on the device, one level for each draft pass, with static shapes.

Shapes: R requests, W nodes expanded in a pass (top_k), C children proposed for each (top_k), M
candidates proposed so far, X nodes expanded so far (of a pass: in the last one), N nodes of the
finished tree, L levels, D hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from vllm_vispec.trees.codes import UNUSED
from vllm_vispec.trees.policies import NEVER, POLICIES

if TYPE_CHECKING:
    from vllm_vispec.trees.settings import TreeSettings

# Rows are normalised so many elements at a time: 64 MiB in float32.
_MAX_ELEMENTS = 2**24
# Draft token of a place that holds no node; no target token equals it.
NO_TOKEN = -1
ROOT = 0


class Frontier(NamedTuple):
    """The nodes that the next draft pass expands.

    Attributes:
        token: int64 ``[R, W]``.
        parent_row: int64 ``[R, W]``; which row of the last pass each comes from.
        score: float32 ``[R, W]``; minus infinity where nothing may grow.
        candidate: int64 ``[R, W]``; its number among all candidates.
        path: int64 ``[R, W, L]``; see `codes.encode`.
    """

    token: torch.Tensor
    parent_row: torch.Tensor
    score: torch.Tensor
    candidate: torch.Tensor
    path: torch.Tensor

    @classmethod
    def of_roots(cls, token_RW: torch.Tensor, levels: int) -> "Frontier":
        """Return roots ``[R, W]``, from which all paths begin."""
        zeros_RW = torch.zeros_like(token_RW)
        path_RWL = torch.full((*token_RW.shape, levels), UNUSED, device=token_RW.device)
        return cls(token_RW, zeros_RW, zeros_RW.float(), zeros_RW - 1, path_RWL)

    def write_level(
        self,
        level: int,
        root_R: torch.Tensor,
        hidden_RXD: torch.Tensor,
        longest: int,
        buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Fill the draft's input with the nodes, row by row.

        Args:
            level: Theirs, from 1; the roots' is 0.
            root_R: The roots' positions.
            hidden_RXD: The draft's states of the last level.
            longest: Tokens of the longest sequence.
            buffers: Token ids and positions ``[T]``, and states, as wide as the draft reads them.
        """
        num_rows, (input_ids, positions, states) = self.token.numel(), buffers
        input_ids[:num_rows] = self.token.flatten()
        position_R1 = (root_R + level).clamp_(max=longest - 1).unsqueeze(1)
        positions[:num_rows] = position_R1.expand_as(self.token).flatten()
        # Logits need all of a state, the next pass what the draft reads of it.
        read_RXD = hidden_RXD[..., : states.shape[1]]
        index_RWD = self.parent_row.unsqueeze(-1).expand(-1, -1, read_RXD.shape[-1])
        states[:num_rows] = read_RXD.gather(1, index_RWD).flatten(0, 1)


class DraftTree(NamedTuple):
    """Finished trees, nodes in score order: parents before children, any head is a tree too.

    Attributes:
        token: int64 ``[R, N]``; `NO_TOKEN` behind the last node.
        parent: int64 ``[R, N]``; `ROOT`, or one more than the parent's place in the list.
        depth: int64 ``[R, N]``; 1 for children of the root.
        path: int64 ``[R, N, L]``; see `codes.encode`.
    """

    token: torch.Tensor
    parent: torch.Tensor
    depth: torch.Tensor
    path: torch.Tensor


def likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the likeliest tokens of each row.

    They are chosen by the logits as they are; only a few whole rows at a time are normalised.

    Args:
        logits: ``[..., V]`` in the model's dtype.
        count: C.

    Returns:
        Log-probabilities, float32 ``[..., C]``, the likeliest first; `NEVER` for all tokens of a
        row that holds no distribution.  And the tokens, int64 ``[..., C]``.
    """
    token = logits.topk(count, dim=-1).indices
    rows_SV, token_SC = logits.flatten(0, -2), token.flatten(0, -2)
    rows_at_a_time = max(1, _MAX_ELEMENTS // logits.shape[-1])
    parts = [
        part_SV.log_softmax(-1, dtype=torch.float32).gather(-1, part_SC)
        for part_SV, part_SC in zip(
            rows_SV.split(rows_at_a_time), token_SC.split(rows_at_a_time), strict=True
        )
    ]
    logp_SC = parts[0] if len(parts) == 1 else torch.cat(parts)
    # A draft that overflows must not put children before their parents.
    logp_SC = logp_SC.nan_to_num(nan=NEVER, neginf=NEVER)
    return logp_SC.view(token.shape), token


class _Level(NamedTuple):
    """Candidates of one level, children of a parent in a row, the likeliest first.

    Attributes:
        token: int64 ``[R, W * C]``.
        score: float32 ``[R, W * C]``; for a place in the finished tree.
        parent: int64 ``[R, W * C]``; the parent's number among all candidates.
        parent_path: int64 ``[R, W, L]``.
    """

    token: torch.Tensor
    score: torch.Tensor
    parent: torch.Tensor
    parent_path: torch.Tensor


class TreeGrower:
    """Grows the trees of one step.

    Call `start_trees`, then `grow_level` once for each draft pass, then `finish_trees`.

    Args:
        settings: How trees are grown.
    """

    def __init__(self, settings: "TreeSettings") -> None:
        self.width = settings.width
        self._levels = settings.levels
        self._policy = POLICIES[settings.policy](settings)
        self._grown: list[_Level] = []
        self._frontier: Frontier | None = None
        self._observed: torch.Tensor | None = None

    def start_trees(self, logits: torch.Tensor) -> Frontier:
        """Take the draft's logits ``[R, V]`` behind the root; return what to expand."""
        num_requests, device = logits.shape[0], logits.device
        zeros_R1 = torch.zeros(num_requests, 1, dtype=torch.int64, device=device)
        root = Frontier.of_roots(zeros_R1, self._levels)
        self._grown.clear()
        num_observed = min(self._policy.num_observed, logits.shape[-1])
        logp_R1C, token_R1C = likeliest(logits.unsqueeze(1), max(self.width, num_observed))
        self._observed = self._policy.observe(logp_R1C[:, 0, :num_observed])
        return self._grow(root, logp_R1C[..., : self.width], token_R1C[..., : self.width])

    def grow_level(self, logits: torch.Tensor) -> Frontier:
        """Take the logits ``[R, W, V]`` of a pass over the last frontier; return the next one."""
        assert self._frontier is not None
        return self._grow(self._frontier, *likeliest(logits, self.width))

    def is_done(self) -> bool:
        """Whether nothing may grow any more, in any tree; waits for the device."""
        assert self._frontier is not None
        return bool((self._frontier.score == NEVER).all())

    def finish_trees(self, num_nodes: int) -> DraftTree:
        """Return the best N candidates; empty places where there are fewer.

        A child scores at most as much as its parent and is a later candidate, so a stable sort
        keeps parents first, ties included.
        """
        token_RM, score_RM, parent_RM, path_RXL = (
            torch.cat(parts, dim=1) for parts in zip(*self._grown, strict=True)
        )
        # Where growing stopped early there may be fewer candidates.
        missing = num_nodes - token_RM.shape[1]
        if missing > 0:
            token_RM = F.pad(token_RM, (0, missing))
            score_RM = F.pad(score_RM, (0, missing), value=NEVER)
            parent_RM = F.pad(parent_RM, (0, missing), value=-1)
            path_RXL = F.pad(path_RXL, (0, 0, 0, missing), value=UNUSED)
        score_RM, order_RM = score_RM.sort(dim=1, descending=True, stable=True)
        place_RM = torch.empty_like(order_RM)
        places_M = torch.arange(order_RM.shape[1], device=order_RM.device)
        place_RM.scatter_(1, order_RM, places_M.expand_as(order_RM))
        order_RN = order_RM[:, :num_nodes]
        parent_RN = parent_RM.gather(1, order_RN)
        parent_RN = torch.where(parent_RN < 0, ROOT, 1 + place_RM.gather(1, parent_RN.clamp(min=0)))
        token_RN = token_RM.gather(1, order_RN)
        token_RN = token_RN.masked_fill(score_RM[:, :num_nodes] == NEVER, NO_TOKEN)
        # Every parent has C candidates, one after another; a child's rank names its branch.
        parent_row_RN1 = (order_RN // self.width).unsqueeze(-1)
        path_RNL = path_RXL.gather(1, parent_row_RN1.expand(-1, -1, self._levels))
        depth_RN1 = (path_RNL != UNUSED).sum(-1, keepdim=True)
        path_RNL.scatter_(2, depth_RN1, (order_RN % self.width).unsqueeze(-1))
        return DraftTree(token_RN, parent_RN, 1 + depth_RN1.squeeze(-1), path_RNL)

    def _grow(self, parents: Frontier, logp_RWC: torch.Tensor, token_RWC: torch.Tensor) -> Frontier:
        """Add the children of the frontier to the candidates and choose the next frontier."""
        assert self._observed is not None
        level = len(self._grown) + 1
        score_RWC = parents.score.unsqueeze(-1) + logp_RWC
        keep_RWC, expand_RWC = self._policy.judge(level, score_RWC, parents.score, self._observed)
        parent_RWC = parents.candidate.unsqueeze(-1).expand_as(token_RWC)
        grown = _Level(
            token_RWC.flatten(1), keep_RWC.flatten(1), parent_RWC.flatten(1), parents.path
        )
        self._frontier = self._choose(parents, grown, expand_RWC.flatten(1))
        self._grown.append(grown)
        return self._frontier

    def _choose(self, parents: Frontier, grown: _Level, expand_RC: torch.Tensor) -> Frontier:
        """Return which candidates of a level are expanded next, given their scores for that."""
        level = len(self._grown) + 1
        first = sum(part.token.shape[1] for part in self._grown)
        score_RW, chosen_RW = expand_RC.topk(self.width, dim=-1)
        parent_row_RW = chosen_RW // self.width
        row_RWL = parent_row_RW.unsqueeze(-1).expand(-1, -1, self._levels)
        path_RWL = parents.path.gather(1, row_RWL)
        path_RWL[..., level - 1] = chosen_RW % self.width
        token_RW = grown.token.gather(1, chosen_RW)
        return Frontier(token_RW, parent_row_RW, score_RW, first + chosen_RW, path_RWL)


class PathGrower(TreeGrower):
    """Grows single paths, which end where the policy says so; they need no codes."""

    def finish_paths(self, num_tokens: int) -> torch.Tensor:
        """Return the tokens, int64 ``[R, num_tokens]``, with `NO_TOKEN` behind the last one."""
        token_RM = torch.cat([level.token for level in self._grown], dim=1)
        score_RM = torch.cat([level.score for level in self._grown], dim=1)
        token_RM.masked_fill_(score_RM == NEVER, NO_TOKEN)
        return F.pad(token_RM, (0, num_tokens - token_RM.shape[1]), value=NO_TOKEN)

    def _choose(self, parents: Frontier, grown: _Level, expand_RC: torch.Tensor) -> Frontier:
        """Return the only child."""
        return parents._replace(token=grown.token, score=expand_RC)


def best_path(tree: DraftTree) -> DraftTree:
    """Return the chains that follow each tree's best child from the root.

    Levels that a tree does not reach, and all places behind, hold `NO_TOKEN`.  A chain needs no
    codes: its paths are `UNUSED`, its depths those of a row of tokens.
    """
    num_requests, num_nodes = tree.token.shape
    # A child's branch is its rank, so this line takes the first branch at every level.
    is_first_RNL = (tree.path == 0) | (tree.path == UNUSED)
    is_on_line_RN = is_first_RNL.all(-1) & (tree.token != NO_TOKEN)
    place_RN = torch.where(is_on_line_RN, tree.depth - 1, num_nodes)
    token_RJ = tree.token.new_full((num_requests, num_nodes + 1), NO_TOKEN)
    token_RJ.scatter_(1, place_RN, tree.token)
    places_N = torch.arange(num_nodes, device=tree.token.device)
    return DraftTree(
        token_RJ[:, :num_nodes],
        places_N.expand_as(tree.token),
        (places_N + 1).expand_as(tree.token),
        torch.full_like(tree.path, UNUSED),
    )


def replace_rows(tree: DraftTree, other: DraftTree, rows_R1: torch.Tensor) -> DraftTree:
    """Return the trees with those of some requests, bool ``[R, 1]``, taken from ``other``."""
    parts = (
        torch.where(rows_R1 if mine.ndim == 2 else rows_R1.unsqueeze(-1), theirs, mine)
        for mine, theirs in zip(tree, other, strict=True)
    )
    return DraftTree(*parts)
