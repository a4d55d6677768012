"""What a head folder is: its configuration, checkpoint formats, reading and writing.

* `config`: `HeadConfig`, shape and flags of a head.
* `formats`: how training codes write heads.
* `location`, `folder`: find a head, check it, read its tensors.
* `export`, `card`: write a trained or converted head and its model card.
* `speculators`: heads that name their target; `target`: does a head fit a target?

This package imports nothing by itself, so that `heads.config` stays cheap to import.
"""
