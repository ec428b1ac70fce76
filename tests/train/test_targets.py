import numpy as np
import pytest
import torch

from cl4wsis_train.data.targets import (
    encode_instance_targets,
    render_center_heatmap,
    semantic_map_from_ids,
    semantic_target_from_ids,
)


def encode_slowly(ids, labels, num_classes, sigma):
    """One image, instance by instance and pixel by pixel."""
    height, width = ids.shape
    heatmap, offsets, weight = np.zeros((num_classes, height, width)), np.zeros((2, height, width)), np.zeros(ids.shape)
    half = 3 * sigma + 1
    for slot, label in enumerate(labels):
        rows, columns = np.nonzero(ids == slot + 1)
        if label < 0 or len(rows) == 0:
            continue
        mean_y, mean_x = rows.mean(), columns.mean()
        center_y, center_x = int(mean_y), int(mean_x)
        for y, x in zip(rows, columns, strict=True):
            offsets[:, y, x] = mean_y - y, mean_x - x
            weight[y, x] = 1
        for y in range(height):
            for x in range(width):
                if abs(y - center_y) <= half and abs(x - center_x) <= half:
                    value = np.exp(-((y - center_y) ** 2 + (x - center_x) ** 2) / (2 * sigma**2))
                    heatmap[label, y, x] = max(heatmap[label, y, x], value)
    return heatmap, offsets, weight[None]


def random_instances(seed, num_slots=6, size=(40, 52), num_classes=4):
    """Rectangles, later ones on top, the last slot padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(size, dtype=np.int32)
    for slot in range(num_slots - 1):
        top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        ids[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = slot + 1
    labels = rng.integers(0, num_classes, num_slots)
    labels[-1] = -1
    return ids, labels


def test_small_map_by_eye():
    ids = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 2]])
    targets = encode_instance_targets(ids, torch.tensor([1, 0]), num_classes=2, sigma=1)
    # Instance 1 covers rows 0..1 and columns 0..2: mean (0.5, 1), Gaussian at the truncated point (0, 1).
    expected_dy = [[0.5, 0.5, 0.5, 0], [-0.5, -0.5, -0.5, 0], [0, 0, 0, 0]]
    expected_dx = [[1, 0, -1, 0], [1, 0, -1, 0], [0, 0, 0, 0]]
    assert targets.offset_target.tolist() == [expected_dy, expected_dx]
    assert targets.loss_weight.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]]
    assert targets.center_target[1, 0, 1] == 1
    assert targets.center_target[0, 2, 3] == 1
    assert targets.center_target[1, 0].tolist() == pytest.approx(np.exp([-0.5, 0, -0.5, -2]).tolist())


@pytest.mark.parametrize("sigma", [2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_matches_the_formula(seed, sigma):
    ids, labels = random_instances(seed)
    targets = encode_instance_targets(torch.from_numpy(ids), torch.from_numpy(labels), 4, sigma)
    for target, expected in zip(targets, encode_slowly(ids, labels, 4, sigma), strict=True):
        assert target.dtype == torch.float32
        np.testing.assert_allclose(target.numpy(), expected, atol=1e-5)


def test_batch_equals_single_images():
    cases = [random_instances(seed) for seed in range(4)]
    ids = torch.stack([torch.from_numpy(ids) for ids, _ in cases])
    labels = torch.stack([torch.from_numpy(labels) for _, labels in cases])
    together = encode_instance_targets(ids, labels, 4, 2.5)
    for index in range(len(ids)):
        alone = encode_instance_targets(ids[index], labels[index], 4, 2.5)
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[index], single, rtol=0, atol=0)


def test_mirrored_masks_give_mirrored_offsets():
    ids, labels = random_instances(7)
    plain = encode_instance_targets(torch.from_numpy(ids), torch.from_numpy(labels), 4, 3)
    mirrored = encode_instance_targets(torch.from_numpy(ids[:, ::-1].copy()), torch.from_numpy(labels), 4, 3)
    expected = plain.offset_target.flip(2) * torch.tensor([1.0, -1.0])[:, None, None]
    torch.testing.assert_close(mirrored.offset_target, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored.loss_weight, plain.loss_weight.flip(2), rtol=0, atol=0)


def test_absent_and_padding_slots_leave_no_trace():
    ids = torch.tensor([[0, 3], [2, 0]])
    targets = encode_instance_targets(ids, torch.tensor([0, 0, -1]), num_classes=1, sigma=1)
    assert targets.loss_weight.tolist() == [[[0, 0], [1, 0]]]
    expected = render_center_heatmap(
        torch.zeros(1, dtype=torch.int64), torch.tensor([[1, 0]]), torch.zeros(1, dtype=torch.int64), (1, 1, 2, 2), 1
    )
    torch.testing.assert_close(targets.center_target, expected[0])


@pytest.mark.parametrize("num_slots", [0, 3])
def test_empty_images(num_slots):
    labels = torch.full((2, num_slots), -1)
    targets = encode_instance_targets(torch.zeros(2, 5, 7, dtype=torch.int32), labels, num_classes=3, sigma=2)
    assert [target.shape for target in targets] == [(2, 3, 5, 7), (2, 2, 5, 7), (2, 1, 5, 7)]
    assert all(not target.any() for target in targets)


@pytest.mark.parametrize(("sigma", "side"), [(1, 9), (2, 15), (2.5, 19), (6, 39), (8, 51)])
def test_gaussian_window(sigma, side):
    one = torch.zeros(1, dtype=torch.int64)
    heatmap = render_center_heatmap(one, torch.tensor([[40, 40]]), one, (1, 1, 81, 81), sigma)
    assert int((heatmap > 0).sum()) == side**2


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (torch.zeros(1, 4, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), "must be"),
        (torch.full((1, 4, 4), 3), torch.zeros(1, 2, dtype=torch.int64), "go up to 3, but labels has 2"),
        (torch.ones(1, 4, 4, dtype=torch.int32), torch.full((1, 1), 2), "labels must lie in 0..1"),
    ],
)
def test_wrong_input_is_named(ids, labels, message):
    with pytest.raises(ValueError, match=message):
        encode_instance_targets(ids, labels, num_classes=2, sigma=1)


def test_semantic_maps():
    ids = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int32)
    labels = torch.tensor([[1, 0, -1]])
    assert semantic_map_from_ids(ids, labels).tolist() == [[[0, 2], [1, 0]]]
    target = semantic_target_from_ids(ids, labels, num_classes=2)
    assert target.tolist() == [[[[1, 0], [0, 1]], [[0, 0], [1, 0]], [[0, 1], [0, 0]]]]
    assert torch.equal(semantic_target_from_ids(ids[0], labels[0], num_classes=2), target[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_equals_cpu():
    ids, labels = (torch.from_numpy(array) for array in random_instances(3))
    expected = encode_instance_targets(ids, labels, 4, 2.5)
    for target, cpu in zip(encode_instance_targets(ids.cuda(), labels.cuda(), 4, 2.5), expected, strict=True):
        torch.testing.assert_close(target.cpu(), cpu)
