"""Masks of patches: how many views and patches they hide, and that they depend on seed, epoch, index and row alone."""

import numpy as np
import pytest
from dino_train.common.masks import MaskKind

KIND = MaskKind(14, 0.5, (0.1, 0.5), 16)


def batch(kind, epoch=0, first=0):
    return np.stack([kind.draw(0, epoch, first + row, row) for row in range(kind.images)])


@pytest.mark.parametrize("kind", [KIND, MaskKind(8, 0.3, (0.2, 0.2), 10), MaskKind(3, 1.0, (0.1, 0.9), 3)])
def test_a_batch_hides_as_much_as_the_kind_says(kind):
    for epoch in range(5):
        counts = batch(kind, epoch).sum(2)
        assert np.count_nonzero(counts) == kind.masks == int(2 * kind.images * kind.probability)
        # Sizes are spread evenly: one in each of as many equal parts of the range.
        low, high = np.array(kind.ratio) * kind.side**2
        edges = np.linspace(low, high, kind.masks + 1)
        sizes = np.sort(counts[counts > 0])
        assert (np.floor(edges[:-1]) <= sizes).all() and (sizes <= edges[1:]).all()
        assert counts.sum() <= kind.most <= counts.sum() + high - low + kind.masks


def test_which_view_and_which_patches_are_hidden_is_random():
    many = np.concatenate([batch(KIND, epoch) for epoch in range(40)])
    first = (many[:, 0].sum(1) > 0).mean()
    assert abs(first - 0.5) < 5 * (0.25 / len(many)) ** 0.5
    share = many.reshape(-1, 14, 14).mean(0)  # 0.15 on average, less at the border, which fewer blocks reach
    assert abs(share.mean() - 0.15) < 0.01 and share.min() > 0.01 and share.max() < 0.3


def test_patches_are_hidden_in_blocks():
    masks = batch(KIND).reshape(-1, 14, 14)
    masks = masks[masks.any((1, 2))]
    alike = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert alike > 0.6 > 1.5 * masks.mean()  # single patches would have a hidden neighbor as often as any


def test_a_mask_depends_on_seed_epoch_index_and_the_row_of_its_image():
    masks = KIND.draw(3, 1, 7, 2)
    assert np.array_equal(masks, KIND.draw(3, 1, 7, 2)) and np.array_equal(masks, KIND.draw(3, 1, 7, 2 + KIND.images))
    for other in ((4, 1, 7, 2), (3, 2, 7, 2), (3, 1, 8, 2), (3, 1, 7, 3)):
        assert not np.array_equal(masks, KIND.draw(*other))
