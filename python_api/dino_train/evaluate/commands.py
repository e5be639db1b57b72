"""`dino-train evaluate <protocol>`: the list of protocols."""

from typing import Annotated

import tyro

from dino_train.evaluate.attention import Attention
from dino_train.evaluate.knn import Knn

Evaluate = Annotated[
    Annotated[Knn, tyro.conf.subcommand("knn")] | Annotated[Attention, tyro.conf.subcommand("attention")],
    tyro.conf.subcommand("evaluate", description="How good a trained backbone is, by one of several protocols."),
]
