"""Compressors of images for the draft.

`spec` reads a compressor's text and `places` says where its tokens stand, both without torch.
`compressor` and `gate` compute; `turns` is the gate over whole sequences. `image_tokens` and
`gated` are the engine's part.

Hooks: `heads.config` reads the text; `reference.modeling_vispec` and `models.vispec` build what it
says; `spec_decode.draft_rows` places tokens and lets the gate decide; `spec_decode.speculator`
follows the lengths of prompts.
"""
