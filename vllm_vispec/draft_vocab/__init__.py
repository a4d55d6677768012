"""The draft's own vocabulary: the target tokens a draft may propose, most frequent first.

`files` is the format, `count` makes a list from answers.  No vLLM here.
"""
