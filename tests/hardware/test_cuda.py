import ctypes

from halve.hardware import cuda_features, detect_cuda
from halve.hardware.cuda import MAJOR, MINOR, MULTIPROCESSORS


class Driver:
    """Two cards as the driver would show them."""

    cards = (("NVIDIA H200", 150_000_000_000, {MULTIPROCESSORS: 132, MAJOR: 9, MINOR: 0}),) * 2
    init = 0

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, handle, index):  # noqa: N802
        handle._obj.value = index

    def cuDeviceGetName(self, name, size, handle):  # noqa: N802
        ctypes.memmove(name, self.cards[handle.value][0].encode() + b"\0", len(self.cards[handle.value][0]) + 1)

    def cuDeviceTotalMem_v2(self, memory, handle):  # noqa: N802
        memory._obj.value = self.cards[handle.value][1]

    def cuDeviceGetAttribute(self, value, which, handle):  # noqa: N802
        value._obj.value = self.cards[handle.value][2][which]


def test_the_driver_tells_each_card():
    devices, reason = detect_cuda(lambda name: Driver())
    assert reason is None
    assert [d.name for d in devices] == ["cuda:0", "cuda:1"]
    first = devices[0]
    assert (first.kind, first.model, first.num_cores, first.memory_bytes) == (
        "cuda",
        "NVIDIA H200",
        132,
        150_000_000_000,
    )
    assert {"sm_80", "sm_89", "sm_90"} <= first.features
    assert "sm_100" not in first.features


def test_without_a_driver_or_a_card_the_reason_is_said():
    def absent(name):
        raise OSError(name)

    assert detect_cuda(absent) == ([], "no NVIDIA driver is installed")

    class Silent(Driver):
        init = 100

    assert detect_cuda(lambda name: Silent()) == ([], "the NVIDIA driver shows no GPU (cuInit says 100)")

    class Empty(Driver):
        cards = ()

    assert detect_cuda(lambda name: Empty()) == ([], "the NVIDIA driver shows no GPU")


def test_a_capability_holds_all_levels_below_and_itself():
    assert cuda_features(8, 0) == {"sm_70", "sm_75", "sm_80"}
    assert "sm_87" in cuda_features(8, 7)
