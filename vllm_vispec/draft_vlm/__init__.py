"""A small vision-language model as the draft (Spec-LLaVA).

Hooks: `plugin` registers its architecture; `heads.config` says which heads are one; both runners
cut the target's states to the width that it reads, which is none.
"""
