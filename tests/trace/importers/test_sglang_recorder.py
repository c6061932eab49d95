"""SGLang's expert distribution recorder, all four modes."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import FormatError
from moesim.trace.format import LoadTrace, Trace
from moesim.trace.importers import sglang_recorder as recorder

torch = pytest.importorskip("torch", reason="writing .pt files needs torch")

PHYSICAL_TO_LOGICAL = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]]


def save(path, content):
    torch.save(content, path)
    return path


def test_stat_is_a_load_trace(tmp_path, options, notes):
    """A circular buffer of 4 steps, 2 used; layer 0 dense: 2 steps x 1 layer x 4 experts."""
    count = torch.zeros((4, 2, 4), dtype=torch.int32)
    count[0, 1] = torch.tensor([3, 1, 0, 4])
    count[1, 1] = torch.tensor([1, 1, 1, 1])
    file = save(
        tmp_path / "expert_distribution_recorder_1.pt",
        {"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None},
    )
    assert recorder.detect(file)
    load = recorder.read([file], options(top_k=2))
    assert isinstance(load, LoadTrace)
    assert load.expert_load.tolist() == [[[3, 1, 0, 4]], [[1, 1, 1, 1]]]
    assert load.meta.layer_ids == (1,)
    assert any("2 steps without any load" in note for note in notes)
    assert not any("gone round" in note for note in notes)
    count[2:, 1] = 1
    recorder.read([save(file, {"logical_count": count})], options(top_k=2))
    assert any("all 4 steps of the buffer are in use" in note for note in notes)


def test_per_pass_sums_ranks_and_maps_slots(tmp_path, options, notes):
    """Slots 0 and 4 hold expert 0 in layer 0; slots 0, 4, 5 hold expert 3 in layer 1."""
    ranks = []
    for rank in (1, 0):
        records = [
            {
                "forward_pass_id": pass_id,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(
                    [[1, 0, 0, 0, 2, 0], [1, 0, 0, 0, 0, 4]], dtype=torch.int32
                )
                * (pass_id + 1),
            }
            for pass_id in (1, 0)
        ]
        ranks.append(
            save(
                tmp_path / f"rank{rank}.pt",
                {
                    "records": records,
                    "last_physical_to_logical_map": torch.tensor(PHYSICAL_TO_LOGICAL),
                },
            )
        )
    load = recorder.read(ranks, options(top_k=1))
    assert isinstance(load, LoadTrace)
    # pass 0: layer 0 expert 0 has (1 + 2) from each of 2 ranks, layer 1 expert 3 (1 + 4) x 2
    assert load.expert_load.tolist() == [
        [[6, 0, 0, 0], [0, 0, 0, 10]],
        [[12, 0, 0, 0], [0, 0, 0, 20]],
    ]
    with pytest.raises(FormatError, match="pass 1 of rank 1 was there already"):
        recorder.read([ranks[0], ranks[0]], options(top_k=1))
    assert not any("some of the" in note for note in notes)
    content = torch.load(ranks[1], weights_only=True)
    content["records"] = content["records"][:1]
    torch.save(content, ranks[1])
    recorder.read(ranks, options(top_k=1))
    assert "1 of 2 passes have no record of some of the 2 ranks" in notes


def token_record(pass_id, mode, positions, slots, lengths=None, rank=0):
    """slots [layers, tokens, k]; padded to 8 columns of -1 as the recorder does."""
    slots = np.asarray(slots)
    padded = np.full((*slots.shape[:2], 8), -1, np.int32)
    padded[:, :, : slots.shape[2]] = slots
    return {
        "forward_pass_id": pass_id,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [100 + p for p in positions],
        "positions": list(positions),
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(padded),
        "misc_objects": [],
        "global_physical_count": torch.zeros((2, 6), dtype=torch.int32),
    }


def per_token(tmp_path, records, name="t.pt"):
    return save(
        tmp_path / name,
        {"records": records, "last_physical_to_logical_map": torch.tensor(PHYSICAL_TO_LOGICAL)},
    )


def test_per_token_maps_slots_back_and_finds_requests(tmp_path, options, notes):
    """Two prompts of 2 and 3 tokens in one pass, then a decode step for both, then one more."""
    prefill = token_record(
        5,
        1,
        [0, 1, 0, 1, 2],
        [[[0, 1]] * 5, [[0, 1]] * 5],
        lengths=[2, 3],
    )
    decode = token_record(6, 2, [2, 3], [[[4, 2], [5, 3]], [[5, 1], [2, 3]]])
    last = token_record(7, 2, [4], [[[2, 3]], [[1, 2]]])
    trace = recorder.read([per_token(tmp_path, [last, prefill, decode])], options(num_experts=4))
    assert isinstance(trace, Trace)
    assert trace.request_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert trace.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert trace.phases.tolist() == [0, 0, 1, 0, 0, 0, 1, 1]
    assert trace.step_ids is not None
    assert trace.step_ids.tolist() == [5, 5, 6, 5, 5, 5, 6, 7]
    # request 0's decode token: layer 0 slots 4, 2 -> experts 0, 2; layer 1 slots 5, 1 -> 3, 2
    assert trace.expert_ids[2].tolist() == [[0, 2], [3, 2]]
    assert trace.expert_ids[0].tolist() == [[0, 1], [3, 2]]
    assert trace.token_ids is not None
    assert trace.token_ids[2] == 102
    assert any("put 2 together" in note for note in notes)


def test_chunked_prefill_mixed_and_idle_passes(tmp_path, options):
    ids = [[[0, 1]] * 3, [[0, 1]] * 3]
    records = [
        token_record(0, 1, [0, 1, 2], ids, lengths=[3]),
        token_record(1, 3, [3, 4, 0], ids, lengths=[2, 1]),  # rest of the prompt, and a new one
        token_record(2, 4, [], np.zeros((2, 0, 2))),
        token_record(3, 3, [5, 1, 2], ids, lengths=[1, 2]),  # one decodes, one is prefilled on
    ]
    trace = recorder.read([per_token(tmp_path, records)], options(num_experts=4))
    assert trace.request_ids.tolist() == [0] * 6 + [1] * 3
    assert trace.phases.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_dense_layers_are_minus_one(tmp_path, options):
    record = token_record(0, 1, [0, 1], [[[-1, -1]] * 2, [[0, 1]] * 2], lengths=[2])
    trace = recorder.read([per_token(tmp_path, [record])], options(num_experts=4))
    assert trace.meta.layer_ids == (1,)
    assert trace.top_k == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_mode": "EXTEND"}, "record 0: forward_mode must be a whole number"),
        ({"rank": None}, "record 0: rank must be a whole number"),
        ({"positions": [0]}, "record 0: topk_ids_of_layer has 2 tokens, positions 1"),
        ({"positions": [0, -4]}, "record 0: positions must be a list of whole numbers"),
        ({"extend_seq_lens": [5]}, "record 0: extend_seq_lens adds up to 5"),
        ({"topk_ids_of_layer": [1, 2]}, "topk_ids_of_layer must be an integer tensor of 3 axes"),
    ],
)
def test_errors_name_file_record_and_field(tmp_path, options, change, message):
    record = token_record(0, 1, [0, 1], [[[0, 1]] * 2, [[0, 1]] * 2], lengths=[2])
    record.update(change)
    file = per_token(tmp_path, [record])
    with pytest.raises(FormatError, match=message) as error:
        recorder.read([file], options(num_experts=4))
    assert str(file) in error.value.cause


def test_fused_shared_experts_are_refused(tmp_path, options):
    record = token_record(0, 1, [0], [[[0, 6]], [[0, 1]]], lengths=[1])
    with pytest.raises(FormatError, match=r"slots from -1 to 6 are outside 0\.\.5") as error:
        recorder.read([per_token(tmp_path, [record])], options(num_experts=4))
    assert "--disable-shared-experts-fusion" in error.value.remedy


def test_a_map_with_empty_slots_is_refused(tmp_path, options):
    """A token that chose such a slot would lose its choice."""
    record = token_record(0, 1, [0], [[[0, 1]], [[0, 1]]], lengths=[1])
    file = per_token(tmp_path, [record])
    content = torch.load(file, weights_only=True)
    content[recorder.MAP][1, 0] = -1
    torch.save(content, file)
    message = f"{recorder.MAP}: layer 1, slot 0: -1 is no expert"
    with pytest.raises(FormatError, match=message) as error:
        recorder.read([file], options(num_experts=4))
    assert str(file) in error.value.cause


def test_modes_are_not_mixed_and_junk_is_refused(tmp_path, options):
    stat = save(tmp_path / "s.pt", {"logical_count": torch.ones((1, 2, 4), dtype=torch.int32)})
    tokens = per_token(tmp_path, [token_record(0, 1, [0], [[[0, 1]]] * 2, lengths=[1])])
    with pytest.raises(FormatError, match="different modes: per_token, stat"):
        recorder.read([stat, tokens], options(top_k=2))
    floats = save(tmp_path / "f.pt", {"logical_count": torch.ones((1, 2, 4))})
    with pytest.raises(FormatError, match="logical_count must be an integer tensor"):
        recorder.read([floats], options(top_k=2))
    empty = save(tmp_path / "e.pt", {"records": [], recorder.MAP: torch.zeros((1, 1))})
    with pytest.raises(FormatError, match="records is empty"):
        recorder.read([empty], options(top_k=2))
    listed = save(tmp_path / "l.pt", [1, 2])
    with pytest.raises(FormatError, match="holds list, wanted a dict"):
        recorder.read([listed], options(top_k=2))


class Boom:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("ran code",))


def test_pickled_code_never_runs(tmp_path, options, capsys):
    file = tmp_path / "expert_distribution_recorder_0.pt"
    torch.save({"logical_count": Boom()}, file)
    with pytest.raises(FormatError, match="objects other than tensors, which are never loaded"):
        recorder.read([file], options(top_k=2))
    file.write_bytes(b"junk")
    with pytest.raises(FormatError, match=r"not a readable \.pt file|never loaded"):
        recorder.read([file], options(top_k=2))
    assert capsys.readouterr().out == ""


def ranks(tmp_path, count, tokens_of):
    """Files of `count` ranks with one pass of 3 tokens each; tokens_of(rank) -> input ids."""
    files = []
    for rank in range(count):
        ids = [[[0, 1], [1, 2], [2, 3]]] * 2
        record = token_record(4, 1, [0, 1, 2], ids, lengths=[3], rank=rank)
        record["input_ids"] = tokens_of(rank)
        files.append(per_token(tmp_path, [record], f"rank{rank}.pt"))
    return files


def test_one_ranks_file_makes_nobodys_home(tmp_path, options, notes):
    files = ranks(tmp_path, 2, lambda rank: [rank, 7, 8])
    trace = recorder.read(files[:1], options(num_experts=4))
    assert trace.rank_ids is None
    assert any("all tokens are of rank 0" in note for note in notes)
    both = recorder.read(files, options(num_experts=4))
    assert both.rank_ids.tolist() == [0] * 3 + [1] * 3


def test_tensor_parallel_ranks_are_one_record(tmp_path, options, notes):
    """Eight ranks with the same tokens in the same pass: 3 tokens of one request, and no homes.
    Two groups of ranks (data parallel 2, tensor parallel 4) are two requests."""
    files = ranks(tmp_path, 8, lambda rank: [5, 6, 7])
    trace = recorder.read(files, options(num_experts=4))
    assert trace.num_tokens == 3
    assert trace.request_ids.tolist() == [0] * 3
    assert trace.rank_ids is None
    assert any("7 of 8 records are left out: 8 ranks recorded the same" in n for n in notes)
    groups = ranks(tmp_path, 8, lambda rank: [rank // 4, 6, 7])
    trace = recorder.read(groups, options(num_experts=4))
    assert trace.request_ids.tolist() == [0] * 3 + [1] * 3
    assert trace.rank_ids is None


def test_json_counts(tmp_path, options):
    """`logical_count` of one step, as floats; fractions are no counts."""
    file = tmp_path / "counts.json"
    file.write_text('{"logical_count": [[3.0, 1.0], [2, 2]]}')
    assert recorder.detect(file)
    load = recorder.read([file], options(top_k=1))
    assert load.expert_load.tolist() == [[[3, 1], [2, 2]]]
    file.write_text('{"logical_count": [[0.5, 1.0]]}')
    with pytest.raises(FormatError, match=r"logical_count\[0, 0, 0\] is 0\.5, which is no count"):
        recorder.read([file], options(top_k=1))
    for bad in ("[[1], [1, 2]]", "7", '"x"', "[[null]]"):
        file.write_text(f'{{"logical_count": {bad}}}')
        with pytest.raises(FormatError, match="logical_count"):
            recorder.read([file], options(top_k=1))


def test_the_same_counts_twice_are_refused(tmp_path, options):
    """`stat` is summed over ranks already: a second rank's file would be the same steps again."""
    content = {"logical_count": torch.ones((1, 2, 4), dtype=torch.int32)}
    files = [save(tmp_path / f"{rank}.pt", content) for rank in range(2)]
    with pytest.raises(FormatError, match="holds the same counts as another"):
        recorder.read(files, options(top_k=2))
