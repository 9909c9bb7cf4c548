import pytest

from streamllm.device import others

GPU = "GPU-51ab"
ANSWER = "GPU-51ab, 100, python\nGPU-77cd, 200, python\nGPU-51ab, 300, /usr/bin/train, on\n"


@pytest.mark.parametrize(
    ("answer", "own", "foreign"),
    [
        (ANSWER, 100, ["300 /usr/bin/train, on"]),
        ("GPU-51ab, 100, python\n", 100, []),
        ("", 100, []),
        ("GPU-51ab, 4711, [Not Found]\n", 100, []),  # a container: ours, under the host's number
        (ANSWER, 1, ["1 of 100 python, 300 /usr/bin/train, on"]),
        ("GPU-77cd, 200, python\n", 100, []),
    ],
)
def test_who_else_computes_on_the_accelerator(answer, own, foreign):
    assert others(answer, GPU, own) == foreign
