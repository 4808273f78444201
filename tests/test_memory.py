import pytest
import torch

from pyreid import ops
from pyreid.memory import MemoryBank


def features(count, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator))


def test_update_is_memory_update():
    bank = MemoryBank(features(9), momentum=0.3, repeats="last", parts=2, normalize=True)
    rows = torch.tensor([1, 4, 1])
    expected = ops.memory_update_(
        features(9), features(3, seed=1), rows, momentum=0.3, repeats="last", parts=2
    )
    bank.update(features(3, seed=1).requires_grad_(), rows)
    torch.testing.assert_close(bank.features, expected, rtol=0, atol=0)
    other = MemoryBank(features(9), momentum=0.3)
    other.update(features(3, seed=1), rows, momentum=1.0)
    torch.testing.assert_close(other.features, features(9))


def test_what_it_is_given_is_not_changed():
    given = features(9)
    bank = MemoryBank(given)
    bank.update(features(1, seed=1), torch.tensor([0]))
    torch.testing.assert_close(given, features(9), rtol=0, atol=0)


def test_mine_leaves_out_the_label():
    labels, cameras = torch.arange(20) % 4, torch.arange(20) % 3
    bank = MemoryBank(features(20), labels, cameras)
    queries, own = features(5, seed=1), torch.arange(5)
    mined = bank.mine(
        queries,
        6,
        skip=1,
        self_rows=own,
        query_labels=own % 4,
        query_cameras=own % 3,
        camera_penalty=0.1,
    )
    expected = ops.mine_negatives(
        queries,
        features(20),
        6,
        skip=1,
        self_rows=own,
        query_groups=own % 4,
        bank_groups=labels,
        query_cameras=own % 3,
        bank_cameras=cameras,
        camera_penalty=0.1,
    )
    torch.testing.assert_close(mined, expected)
    assert (labels[mined.rows] != (own % 4)[:, None]).all()


def test_half_precision_copy_keeps_step():
    bank = MemoryBank(features(50), search_dtype=torch.float16)
    rows = torch.tensor([3, 3, 7])
    bank.update(features(3, seed=1), rows)
    torch.testing.assert_close(bank.search_features, bank.features.half(), rtol=0, atol=0)
    mined = bank.mine(features(2, seed=2), 5, precision="fast")
    scores = features(2, seed=2) @ bank.features.half().float().T
    torch.testing.assert_close(mined.scores, scores.topk(5).values)


def test_state_dict_of_another_size():
    bank = MemoryBank(features(9), torch.arange(9), search_dtype=torch.bfloat16)
    bank.update(features(2, seed=1), torch.tensor([0, 5]))
    other = MemoryBank(features(3, seed=3), search_dtype=torch.bfloat16)
    other.load_state_dict(bank.state_dict())
    assert set(bank.state_dict()) == {"features", "labels", "cameras"}
    torch.testing.assert_close(other.features, bank.features)
    torch.testing.assert_close(other.labels, torch.arange(9))
    torch.testing.assert_close(other.search_features, bank.search_features)


def test_reset_to_another_size():
    bank = MemoryBank(features(9), torch.arange(9))
    bank.reset(features(4, seed=1))
    assert len(bank) == 4
    assert bank.labels.tolist() == [-1] * 4
    assert bank.cameras.tolist() == [0] * 4
    with pytest.raises(ValueError) as error:
        bank.reset(features(4), torch.arange(5))
    assert str(error.value) == "MemoryBank: labels must have shape (4,), got (5,)"


def test_module_moves_and_copies():
    import copy

    bank = MemoryBank(features(9), torch.arange(9))
    twin = copy.deepcopy(bank).double().float()
    twin.update(features(1, seed=1), torch.tensor([2]))
    assert not torch.equal(twin.features, bank.features)
    assert "9 x 16" in repr(bank)
