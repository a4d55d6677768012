"""The draft's own vocabulary: the target tokens a draft may propose, most frequent first.

`make` builds a list from answers, `files` finds and reads the one a user asks for, `model` gives
the draft its smaller lm_head.

Hooks: `spec_decode.config_hook` resolves the setting; the draft models of `models.vispec` have
`DraftLogits` among their bases; both runners' `load_model` call `give_own_lm_head`.
"""
