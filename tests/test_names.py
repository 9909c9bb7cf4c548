"""Every name that can be asked for leads to what it names; a name stands in one place."""

import pytest
import torch

from orchestrator.options import SAMPLERS
from streamllm.engine.methods import METHODS, OFFERED, Method, method_named
from streamllm.engine.quantization import Quantizer
from streamllm.engine.slots import RingSlots
from streamllm.options import EXECUTIONS, PROTOCOLS, QUANTIZATIONS
from streamllm.terminal.arguments import add_method_argument
from streamllm.terminal.parser import CommandParser


def test_every_name_leads_somewhere():
    for entries in (EXECUTIONS, PROTOCOLS, QUANTIZATIONS, SAMPLERS):
        assert all(entry is None or entry.get() is not None for entry in entries.values())
    assert [name for name, entry in QUANTIZATIONS.items() if entry is None] == ["none"]
    assert [name for name, entry in EXECUTIONS.items() if entry is None] == ["eager"]
    assert all(isinstance(entry.get(), Quantizer) for entry in QUANTIZATIONS.values() if entry is not None)


def test_every_file_is_a_method():
    for name in METHODS:
        method = method_named(name)
        assert isinstance(method, Method)
        assert set(method.executions) <= set(EXECUTIONS) and set(method.protocols) <= set(PROTOCOLS)


def test_what_gains_nothing_is_known_but_not_offered(capsys):
    parser = CommandParser()
    add_method_argument(parser, "--streaming-mode", default="ours")
    assert "refresh" in METHODS and set(METHODS) - set(OFFERED) == {"refresh"}
    assert "refresh" not in parser.format_help() and "ring" in parser.format_help()
    assert parser.parse_args(["--streaming-mode", "refresh"]).method == "refresh"
    with pytest.raises(SystemExit):
        parser.parse_args(["--method", "rings"])
    said = capsys.readouterr().err
    assert "--method/--streaming-mode: 'rings': must be one of dense, kvpress" in said and "did you mean ring?" in said
    assert "refresh" not in said


@pytest.mark.parametrize(("n_sink", "count"), [(0, 5), (3, 4), (3, 10)])
def test_slots_of_a_ring(n_sink, count):
    """Of one token, of many, and back from a slot to its token; beside it, a ring that is filled one by one."""
    ring, slots = RingSlots(n_sink, count), {}
    for last in range(4 * count):
        slots[last if last < count else n_sink + (last - count) % (count - n_sink)] = last
        assert {ring.of(position): position for position in ring.held(last + 1)} == slots
        positions = torch.arange(last + 1)
        assert ring.of_each(positions).tolist() == [ring.of(position) for position in range(last + 1)]
        newest = ring.newest(torch.tensor(last)).tolist()
        assert [max(position, n_sink - 1) for position in newest] == [
            slots.get(slot, n_sink - 1) for slot in range(n_sink, count)
        ]
