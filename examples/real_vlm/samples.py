"""Questions about images, answers in long free English, and the facts that an answer must state.

What the language model can write itself comes from `own`: stories, chats, sentences about things.
What it cannot, because it has not seen the image, is sampled from sentences with alternatives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from .canvas import Canvas
from .pictures import PICTURES
from .words import a, at, choose, fill, listing, number, plural, say
from .worlds import PLACES, Chart, Document, Scene, Table, World, chart, document, scene, table

HELD_OUT = 10**9  # seeds from here on are in no training
Fact = tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """A fact is stated if one sentence of an answer has all its phrases.

    `whole`: the answer ends there; else it was cut, and no end is learned.
    """

    question: str
    answer: str
    facts: tuple[Fact, ...] = ()
    whole: bool = True


@dataclass(frozen=True)
class Sample:
    """A dialogue; its images stand before the first question."""

    kind: str
    images: tuple[Canvas, ...]
    turns: tuple[Turn, ...]

    def messages(self, turn: int) -> list[dict[str, Any]]:
        """Chat messages up to a turn's question, with placeholders for the images."""
        found: list[dict[str, Any]] = []
        for i, one in enumerate(self.turns[: turn + 1]):
            shown = [{"type": "image"} for _ in self.images] if i == 0 else []
            found.append(
                {"role": "user", "content": [*shown, {"type": "text", "text": one.question}]}
            )
            said = [{"type": "text", "text": one.answer}]
            found.append({"role": "assistant", "content": said})
        return found[:-1]


@dataclass
class Own:
    """The language model's own texts; all of them may be missing."""

    about: dict[str, list[str]] = field(default_factory=dict)
    stories: list[dict[str, Any]] = field(default_factory=list)
    chats: list[tuple[str, str, bool]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, held_out: bool = False) -> Own:
        """All parts in a folder; every tenth chat is held out."""
        own = cls()
        for file in sorted(folder.glob("part-*.json")):
            part = json.loads(file.read_text())
            own.stories += part["stories"]
            own.chats += [
                tuple(c) for i, c in enumerate(part["chats"]) if (i % 10 == 0) == held_out
            ]
            for name, sentences in part["about"].items():
                own.about.setdefault(name, []).extend(sentences)
        return own


def describe(rng: Random, world: Scene, own: Own) -> Turn:
    """Thing by thing, with what the language model knows about some of them."""
    said = [say(rng, "describe.count", n=number(len(world.things)))]
    for i, thing in enumerate(world.things):
        text = say(rng, "describe.thing", x=a(thing.name), at=at(rng, thing.place))
        lead = choose(rng, "describe.lead") if i else ""
        said.append(f"{lead} {text}" if lead else text[0].upper() + text[1:])
        if own.about.get(thing.name) and rng.random() < 0.3:
            said.append(rng.choice(own.about[thing.name]))
    if rng.random() < 0.5:
        said.append(say(rng, "describe.end", f=world.things[0].name, l=world.things[-1].name))
    facts = tuple((thing.name, thing.place) for thing in world.things)
    return Turn(say(rng, "describe.ask"), " ".join(said), facts)


def ask_scene(rng: Random, world: Scene, own: Own) -> Turn:
    """Where, what, how many, whether; half of the answers tell more about the thing."""
    thing, names = rng.choice(world.things), [one.name for one in world.things]
    places = [one.place for one in world.things if one.name == thing.name]
    slots = {"x": thing.name, "xs": plural(thing.name), "n": number(len(places))}
    known = own.about.get(thing.name)
    more = f" {rng.choice(known)}" if known and rng.random() < 0.5 else ""
    kind = rng.choice(("where", "where", "what", "count", "count", "count_all", "exists", "list"))
    facts: list[Fact]
    if kind in ("where", "count"):
        ask = say(rng, f"{kind}.ask", **slots)
        facts = [(place,) for place in places]
        if len(places) == 1:
            text = say(rng, f"{kind}.one", **slots, at=at(rng, places[0])) + more
            return Turn(ask, text, ((thing.name, places[0]),))
        each = [say(rng, f"{kind}.each", at=at(rng, place)) for place in places]
        text = say(rng, f"{kind}.many", **slots, places=listing(each))
        return Turn(ask, text, ((slots["n"], slots["xs"]), *facts))
    if kind == "what":
        place = rng.choice((thing.place, thing.place, rng.choice(PLACES)))
        here = [one.name for one in world.things if one.place == place]
        ask = say(rng, "what.ask", at="in the center" if place == "center" else f"at the {place}")
        if not here:
            return Turn(ask, say(rng, "what.nothing", at=at(rng, place)), (("nothing", place),))
        text = say(rng, "what.found", xs=listing([a(name) for name in here]), at=at(rng, place))
        return Turn(ask, text, tuple((name, place) for name in here))
    every, facts = listing([a(name) for name in names]), [(name,) for name in names]
    if kind == "count_all":
        text = say(rng, "count_all.text", xs=every, n=number(len(names)))
        return Turn(say(rng, "count_all.ask"), text, ((number(len(names)),),))
    if kind == "list":
        return Turn(say(rng, "list.ask"), say(rng, "list.text", xs=every) + more, tuple(facts))
    if rng.random() < 0.5:
        text = say(rng, "exists.yes", x=a(thing.name), at=at(rng, places[0])) + more
        return Turn(
            say(rng, "exists.ask", x=a(thing.name)), text, (("yes", thing.name, places[0]),)
        )
    absent = rng.choice([name for name in PICTURES if name not in names])
    text = say(rng, "exists.no", x=absent, xs=every)
    return Turn(say(rng, "exists.ask", x=a(absent)), text, (("no", absent), *facts))


def ask_chart(rng: Random, world: Chart, own: Own) -> Turn:
    """Read out, one bar, the extremes, two bars compared."""
    bars = {name: value for name, value, _ in world.bars}
    high, low = max(bars, key=bars.__getitem__), min(bars, key=bars.__getitem__)
    slots = {"t": world.title, "u": world.unit, "n": number(len(bars))}
    slots |= {"hi": high, "hv": str(bars[high]), "lo": low, "lv": str(bars[low])}
    ends = f"{say(rng, 'chart.top', **slots)} {say(rng, 'chart.low', **slots)}"
    kind = rng.choice(("read", "read", "read", "one", "ends", "two"))
    if kind == "read":
        style, said = choose(rng, "chart.bar"), [say(rng, "chart.title", **slots)]
        said += [fill(rng, style, x=n, v=v, c=c, **slots) for n, v, c in world.bars]
        said += [ends] if rng.random() < 0.6 else []
        facts: tuple[Fact, ...] = tuple((name, str(value)) for name, value in bars.items())
        return Turn(say(rng, "chart.read"), fill(rng, " ".join(said)), (*facts, (world.title,)))
    if kind == "ends":
        facts = ((high, slots["hv"]), (low, slots["lv"]))
        return Turn(say(rng, "chart.ask_ends"), ends[0].upper() + ends[1:], facts)
    x, y = rng.sample(list(bars), 2)
    if kind == "one":
        text = say(rng, "chart.one", x=x, v=bars[x], **slots)
        return Turn(say(rng, "chart.ask_one", x=x, **slots), text, ((x, str(bars[x])),))
    more, less = (x, y) if bars[x] > bars[y] else (y, x)
    text = say(rng, "chart.two", x=x, y=y, vx=bars[x], vy=bars[y], m=more, less=less, **slots)
    facts = ((x, str(bars[x])), (y, str(bars[y])), (f"so {more}",))
    return Turn(say(rng, "chart.ask_two", x=x, y=y), text, facts)


def ask_table(rng: Random, world: Table, own: Own) -> Turn:
    """Read out, a row, a cell."""
    rows = {
        name: [f"{column} {value}" for column, value in zip(world.columns, values, strict=True)]
        for name, values in world.rows
    }
    kind, name = rng.choice(("read", "read", "row", "cell")), rng.choice(list(rows))
    if kind == "read":
        style = choose(rng, "table.row")
        said = [say(rng, "table.head", n=number(len(rows)), c=listing(list(world.columns)))]
        said += [fill(rng, style, x=x, p=listing(cells)) for x, cells in rows.items()]
        facts = tuple((x, cell) for x, cells in rows.items() for cell in cells)
        return Turn(say(rng, "table.read"), fill(rng, " ".join(said)), facts)
    if kind == "row":
        text = say(rng, "table.one_row", x=name, p=listing(rows[name]))
        return Turn(say(rng, "table.ask_row", x=name), text, tuple((name, c) for c in rows[name]))
    column, value = rng.choice(rows[name]).split()
    text = say(rng, "table.cell", x=name, c=column, v=value, p=listing(rows[name]))
    return Turn(say(rng, "table.ask_cell", x=name, c=column), text, ((name, column, value),))


def ask_document(rng: Random, world: Document, own: Own) -> Turn:
    """Transcribe, the title, one line."""
    lines, title = world.lines, world.title
    kind = rng.choice(("read", "read", "read", "title", "line"))
    if kind == "read":
        text = "\n".join([say(rng, "document.head", t=title), *(f"{line}." for line in lines)])
        return Turn(say(rng, "document.read"), text, ((title,), *((line,) for line in lines)))
    if kind == "title":
        text = say(rng, "document.title", t=title, n=number(len(lines)), l=lines[0])
        return Turn(say(rng, "document.ask_title"), text, ((title,),))
    which, line = rng.choice((("first", lines[0]), ("second", lines[1]), ("last", lines[-1])))
    text = say(rng, "document.line", w=which, l=line)
    return Turn(say(rng, "document.ask_line", w=which), text, ((line,),))


_ASK: dict[type, Callable[[Random, Any, Own], Turn]] = {
    Scene: ask_scene,
    Chart: ask_chart,
    Table: ask_table,
    Document: ask_document,
}


def _both(rng: Random, own: Own) -> Sample:
    both = {"first": scene(rng), "second": scene(rng)}
    said = [
        say(rng, "two.each", w=which, xs=listing([a(thing.name) for thing in world.things]))
        for which, world in both.items()
    ]
    facts = tuple((which, t.name) for which, world in both.items() for t in world.things)
    turn = Turn(say(rng, "two.ask"), " ".join(said), facts)
    return Sample("two", tuple(world.canvas for world in both.values()), (turn,))


def _story(rng: Random, own: Own) -> Sample:
    text = rng.choice(own.stories)
    shown = scene(rng, text["names"])
    facts = tuple((name,) for name in text["names"])
    turn = Turn(text["question"], text["answer"], facts, text["whole"])
    return Sample("story", (shown.canvas,), (turn,))


def _chat(rng: Random, own: Own) -> Sample:
    question, answer, whole = rng.choice(own.chats)
    return Sample("chat", (), (Turn(question, answer, whole=whole),))


def _turns(rng: Random, own: Own) -> Sample:
    world: World = rng.choice((scene, scene, chart, table, document))(rng)
    turns = {
        t.question: t
        for t in (_ASK[type(world)](rng, world, own) for _ in range(rng.randint(2, 5)))
    }
    return Sample("turns", (world.canvas,), tuple(turns.values()))


def _one(kind: str, make: Any, ask: Any) -> Callable[[Random, Own], Sample]:
    def build(rng: Random, own: Own) -> Sample:
        world = make(rng)
        return Sample(kind, (world.canvas,), (ask(rng, world, own),))

    return build


KINDS: dict[str, tuple[Callable[[Random, Own], Sample], float]] = {
    "describe": (_one("describe", scene, describe), 20),
    "scene": (_one("scene", scene, ask_scene), 18),
    "chart": (_one("chart", chart, ask_chart), 11),
    "table": (_one("table", table, ask_table), 10),
    "document": (_one("document", document, ask_document), 11),
    "turns": (_turns, 30),
    "two": (_both, 4),
    "story": (_story, 8),
    "chat": (_chat, 12),
}


def make_sample(seed: int, own: Own, kind: str | None = None) -> Sample:
    """The dialogue of a seed; without own texts there are no stories and no chats."""
    rng = Random(seed)
    names = [k for k in KINDS if (own.stories or k != "story") and (own.chats or k != "chat")]
    drawn = rng.choices(names, [KINDS[name][1] for name in names])[0]
    return KINDS[kind or drawn][0](rng, own)


def stated(facts: tuple[Fact, ...], answer: str) -> int:
    """How many facts an answer states: all phrases of one in one sentence, as whole words."""
    sentences = [
        f" {' '.join(re.findall(r'[a-z0-9]+', part.lower()))} "
        for part in re.split(r"[.!?\n;]", answer)
    ]
    return sum(
        any(all(f" {phrase.lower()} " in sentence for phrase in fact) for sentence in sentences)
        for fact in facts
    )
