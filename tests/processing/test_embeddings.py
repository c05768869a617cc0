import numpy as np
import pytest
import torch

from opsin.errors import MediaError, RequestError
from opsin.processing.embeddings import read_embedding, read_embeddings, split_embeddings

WIDTH = 8
PARAM = "multi_modal_data.image"


def test_rows_of_several_items_are_shared_out_by_their_grids() -> None:
    rows = torch.arange(12.0)[:, None].repeat(1, WIDTH)
    grids = torch.tensor([[1, 4, 4], [1, 8, 4]])  # 16 and 32 cells: 4 and 8 rows
    first, second = read_embeddings("image", {"image_embeds": rows, "image_grid_thw": grids}, WIDTH, PARAM)
    assert first.data[:, 0].tolist() == [0, 1, 2, 3]
    assert second.data[:, 0].tolist() == list(range(4, 12))
    assert [first.extras, second.extras] == [{"image_grid_thw": (1, 4, 4)}, {"image_grid_thw": (1, 8, 4)}]


@pytest.mark.parametrize("key", ["image_sizes", "image_size_list"])
def test_sizes_are_taken_under_either_name(key: str) -> None:
    data = {"image_embeds": torch.zeros(2, 3, WIDTH), key: [(640, 480), (10, 20)]}
    items = read_embeddings("image", data, WIDTH, PARAM)
    assert [item.extras for item in items] == [{"image_sizes": (640, 480)}, {"image_sizes": (10, 20)}]
    (single,) = read_embeddings("image", {"image_embeds": torch.zeros(1, 3, WIDTH), key: [640, 480]}, WIDTH, PARAM)
    assert single.extras == {"image_sizes": (640, 480)}


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"image_embeds": torch.zeros(11, WIDTH), "image_grid_thw": [[1, 4, 4], [1, 8, 4]]}, MediaError, "shared out"),
        ({"image_embeds": torch.zeros(12, WIDTH), "image_sizes": [(4, 4), (8, 4)]}, MediaError, "shared out"),
        ({"image_embeds": torch.zeros(4, WIDTH), "image_grid_thw": [[1, 4]]}, RequestError, "3 positive whole numbers"),
        ({"image_embeds": torch.zeros(4, WIDTH), "image_grid_thw": [[1, 4, 0]]}, RequestError, "3 positive"),
        ({"image_grid_thw": [[1, 4, 4]]}, RequestError, "no 'image_embeds'"),
        ({"image_embeds": "AAAA"}, MediaError, "must be a torch tensor or a NumPy array, got str"),
    ],
)
def test_features_that_do_not_fit_are_refused(data: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_embeddings("image", data, WIDTH, PARAM)


def test_digest_names_numbers_and_dtype() -> None:
    def digest(value: object) -> bytes:
        return read_embedding(value, WIDTH).digest

    ones = torch.ones(2, WIDTH)
    assert digest(ones) == digest(ones.numpy()) == digest(ones[None]) == digest(ones.T.contiguous().T)
    assert len({digest(ones), digest(ones * 2), digest(ones.half()), digest(torch.ones(3, WIDTH))}) == 4
    assert [item.digest for item in split_embeddings(torch.stack([ones, ones * 2]), WIDTH)] == [
        digest(ones),
        digest(ones * 2),
    ]


def test_bfloat16_keeps_its_values() -> None:
    value = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    np.testing.assert_array_equal(read_embedding(value, WIDTH).data, value.float().numpy())
