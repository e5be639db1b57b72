"""The images of a run, and what their values mean."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from dino_train.common import checkpoint
from dino_train.common.scale import scale_of, scale_settings
from dino_train.config.pretrain import PretrainConfig
from dino_train.data.folder import ImageFolder, pretraining_split
from dino_train.data.stats import sampled
from dino_train.data.stream import ShardStream, count_samples, is_shards, shard_urls


class Images(NamedTuple):
    """To train on; those of them that k-NN compares with; held out."""

    train: ImageFolder | ShardStream
    labelled: ImageFolder | ShardStream
    held_out: ImageFolder | None


def find_images(config: PretrainConfig) -> tuple[PretrainConfig, Images]:
    """The images of `config.data`, and the settings with their scale.

    Raises:
        DataError, ValueError: with a message for the user.
    """
    if not config.data:
        reason = "there are no images to train on: give --data FOLDER, or --preset demo for embedded ones"
        if config.resume and not checkpoint.exists(config.output_dir):
            reason = f"{config.output_dir} holds no run to resume, and {reason}"
        raise ValueError(reason)
    if is_shards(config.data):
        urls = shard_urls(config.data)
        if config.channels != 3 and not config.value_range:
            raise ValueError("shards of other images than RGB are not measured: give --stats or --value-range")
        stream = ShardStream(urls, count_samples(urls, config.output_dir))
        return config, Images(stream, stream, None)
    split = pretraining_split(config.data)
    config = _with_scale(config, split[0])
    return config, Images(*(images.scaled(config.scale) for images in split))


def _with_scale(config: PretrainConfig, images: ImageFolder) -> PretrainConfig:
    """With the range, mean and deviation of images that are not 8-bit RGB: those of the run that is resumed, or else
    measured unless they are given."""
    if config.resume and (path := config.output_dir / "config.json").exists():
        with suppress(OSError, ValueError):  # measured again
            before = scale_settings(scale_of(json.loads(path.read_text()), config.channels))
            missing: dict[str, Any] = {name: value for name, value in before.items() if not getattr(config, name)}
            config = replace(config, **missing)
    known = config.value_range and config.mean and config.std
    stats = None if known else sampled(images, config.channels, config.num_workers, config.value_range)
    if stats is None:
        return config
    mean, std = config.mean or stats.mean, config.std or stats.std
    return replace(config, value_range=stats.value_range, mean=mean, std=std)
