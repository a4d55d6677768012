"""A published model as the draft, as it is: a small VLM of the target's family, or a text model.

Hooks: `plugin` registers its architecture; `spec_decode.config_hook` asks `published` whether a
folder is such a model; the runners take their speculator or proposer from here.
"""
