"""`override(...)`: what it pins for whom, where it ends, and what a compiler's cache sees of it."""

import threading
from contextlib import contextmanager

import pytest

import ssm_configs
from ssm_configs import override, override_token

from .configs_env import H100, OP, entry, explain, forget_everything, lookup, put_table

PALLAS = {"BLOCK_SIZE_M": 64, "tiles_per_block": 4, "use_tma": False}


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    forget_everything(monkeypatch)
    put_table(tmp_path / OP, {"8": entry(16, 2, pallas=PALLAS)})
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path))


def knobs(twin: str) -> dict:
    return lookup(8, twin=twin).knobs


def test_shared_knobs_serve_both_twins():
    with override(OP, BLOCK_SIZE_M=8, num_warps=1):
        assert knobs("triton") == entry(8, 1)
        assert knobs("pallas") == {"BLOCK_SIZE_M": 32, "tiles_per_block": 1, "use_tma": False}
    assert (knobs("triton"), knobs("pallas")) == (entry(16, 2), PALLAS)


def test_missing_shared_knobs_come_from_the_table():
    with override(OP, num_warps=4):
        config = lookup(8)
        assert config.knobs == entry(16, 4)
        assert config.source == "override"
        assert config.path is not None and config.key == 8
        # By the rule from (16, 4), not from the entry's own Pallas object.
        assert knobs("pallas") == {"BLOCK_SIZE_M": 16, "tiles_per_block": 1, "use_tma": False}


def test_a_twins_own_knobs_leave_the_other_alone():
    with override(OP, twin="pallas", tiles_per_block=1):
        assert knobs("pallas") == PALLAS | {"tiles_per_block": 1}
        assert lookup(8).source == "SSM_TUNED_CONFIG_FOLDER"
        assert knobs("triton") == entry(16, 2)
    with override(OP, twin="triton", num_warps=8):
        assert knobs("triton") == entry(16, 8)
        assert knobs("pallas") == PALLAS


def test_inner_blocks_win_and_keep_the_rest():
    with override(OP, BLOCK_SIZE_M=4, num_warps=1):
        with override(OP, num_warps=8):
            assert knobs("triton") == entry(4, 8)
            with override(OP, twin="pallas", use_tma=True):
                assert knobs("pallas") == {"BLOCK_SIZE_M": 4, "tiles_per_block": 1, "use_tma": True}
                with override(OP, BLOCK_SIZE_M=64):  # shared: Pallas follows the rule anew
                    assert knobs("triton") == entry(64, 8)
                    assert knobs("pallas") == {"BLOCK_SIZE_M": 32, "tiles_per_block": 1, "use_tma": False}
        assert knobs("triton") == entry(4, 1)
    assert knobs("triton") == entry(16, 2)


def test_a_complete_override_reads_no_table(tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("SSM_TUNED_CONFIG_FOLDER", str(tmp_path / "absent"))
    with override(OP, BLOCK_SIZE_M=8, num_warps=1):
        assert explain(8).steps == (("override", "BLOCK_SIZE_M=8, num_warps=1"),)
        assert lookup(8, twin="pallas").path is None
    with override(OP, twin="pallas", **PALLAS):
        assert knobs("pallas") == PALLAS
        with pytest.raises(ssm_configs.TableError):
            knobs("triton")
    assert not recwarn


def test_the_end_of_a_block_is_the_end_of_the_override():
    with pytest.raises(RuntimeError, match="inside"), override(OP, num_warps=8):
        raise RuntimeError("inside")
    assert knobs("triton") == entry(16, 2)
    assert override_token() is None


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"op": "softmax", "num_warps": 1}, ValueError, "op: got 'softmax'"),
        ({"twin": "cuda", "num_warps": 1}, ValueError, "twin: got 'cuda', expected None or one of"),
        ({}, ValueError, "expected at least one knob"),
        ({"num_stages": 2}, ValueError, "unknown knob 'num_stages'; expected BLOCK_SIZE_M, num_warps"),
        ({"twin": "pallas", "num_warps": 1}, ValueError, "unknown knob 'num_warps'; expected BLOCK_SIZE_M, tiles_per"),
        ({"BLOCK_SIZE_M": 3}, ValueError, "BLOCK_SIZE_M: got 3, expected one of"),
        ({"num_warps": "1"}, TypeError, r"num_warps: expected int, got '1' \(str\)"),
        ({"num_warps": True}, TypeError, r"num_warps: expected int, got True \(bool\)"),
        ({"twin": "pallas", "use_tma": 1}, TypeError, "use_tma: expected bool, got 1"),
    ],
)
def test_wrong_overrides_are_refused_on_entry(arguments, error, message):
    with pytest.raises(error, match=message), override(**({"op": OP} | arguments)):
        pytest.fail("the block ran")
    assert override_token() is None


def test_what_the_static_sizes_forbid_is_refused_by_the_lookup():
    with override(OP, twin="pallas", BLOCK_SIZE_M=24):
        message = r"override\('selective_state_update'\): BLOCK_SIZE_M: got 24, which does not divide headdim=64"
        with pytest.raises(ValueError, match=message):
            knobs("pallas")
        wide = {"device": H100, "dtype": "float32", "size": 8, "headdim": 48, "dstate": 128}
        with pytest.warns(ssm_configs.TableWarning):
            assert ssm_configs.lookup(OP, twin="pallas", **wide)["BLOCK_SIZE_M"] == 24


def test_overrides_are_local_to_their_thread():
    choices = (1, 2, 4, 8, 16, 32)
    start, results = threading.Barrier(len(choices)), {}

    def work(warps: int):
        start.wait()
        with override(OP, num_warps=warps):
            results[warps] = {lookup(8)["num_warps"] for _ in range(500)}

    threads = [threading.Thread(target=work, args=(warps,)) for warps in choices]
    with override(OP, BLOCK_SIZE_M=1, num_warps=1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {warps: {warps} for warps in choices}


# Tokens and hooks


def test_tokens_are_equal_for_equal_overrides_and_differ_otherwise():
    def token(**pinned):
        with override(OP, **pinned):
            return override_token()

    assert override_token() is None
    assert token(BLOCK_SIZE_M=8, num_warps=1) == token(num_warps=1, BLOCK_SIZE_M=8)
    assert hash(token(num_warps=1)) == hash(token(num_warps=1))
    tokens = [token(num_warps=1), token(num_warps=2), token(twin="triton", num_warps=1), token(BLOCK_SIZE_M=1)]
    with override(OP, num_warps=1):
        tokens.append(token(num_warps=2))
    assert len(set(tokens)) == 5


def test_hooks_are_entered_and_left_with_each_override():
    events = []

    @contextmanager
    def hook(token):
        events.append(("enter", token))
        assert token == override_token()
        yield
        events.append(("exit", token))

    remove = ssm_configs.on_override(hook)
    try:
        with override(OP, num_warps=1):
            outer = override_token()
            with override(OP, num_warps=2):
                inner = override_token()
    finally:
        remove()
    assert events == [("enter", outer), ("enter", inner), ("exit", inner), ("exit", outer)]
    with override(OP, num_warps=1):
        assert len(events) == 4


def test_a_hook_that_fails_undoes_the_override():
    def hook(token):
        raise RuntimeError("no context")

    remove = ssm_configs.on_override(hook)
    try:
        with pytest.raises(RuntimeError, match="no context"), override(OP, num_warps=1):
            pytest.fail("the block ran")
    finally:
        remove()
    assert override_token() is None


def test_a_hook_cannot_join_an_active_override():
    with override(OP, num_warps=1), pytest.raises(RuntimeError, match="inside an active override"):
        ssm_configs.on_override(lambda token: pytest.fail("entered"))
    with override(OP, num_warps=1):  # and it was not kept
        pass
