"""What documents say about how chips are wired: ICI, DCN, topology and pod size, as data.

jax's chip table has none of this. A link's one-way figure is the scaling-book's where it has one,
and the documentation's chip total divided by its links otherwise; both stand where both exist.

>>> LINKS["8i"]["topology"][0].value
'boardfly'
"""

from tpu_stack.hardware.fact import Fact

GB = 10**9
GBIT = 10**9 // 8

Facts = tuple[Fact, ...]


def _rate(gigabytes_per_s: int, source: str, note: str = "") -> Fact:
    return Fact(value=gigabytes_per_s * GB, unit="bytes/s", source=source, note=note)


def _topology(kind: str, source: str = "GD") -> Facts:
    return (Fact(value=kind, unit="text", source=source),)


def _ports(count: int, source: str, note: str = "") -> Facts:
    return (Fact(value=count, unit="count", source=source, note=note),)


def _pod(chips: int, source: str = "GD") -> Facts:
    return (Fact(value=chips, unit="chips", source=source),)


def _dcn(gigabits_per_s: int) -> Facts:
    return (Fact(value=gigabits_per_s * GBIT, unit="bytes/s", source="GD"),)


_SIX_PORTS = "derived: two per axis of a 3D torus"
_FIRST = "the scaling-book's figure comes first; its present edition rounds it up to the GD figure"


LINKS: dict[str, dict[str, Facts]] = {
    "v4": {
        "topology": _topology("torus3d"),
        "pod_chips": _pod(4096),
        "ici_ports": _ports(6, "GD", _SIX_PORTS),
        "ici_link_bytes_per_s_one_way": (_rate(45, "SB"),),
        "ici_bytes_per_s_bidirectional": (
            _rate(540, "SB", "derived: 6 links x 2 ways x 45 GB/s; GD gives none"),
        ),
    },
    "v5e": {
        "topology": _topology("torus2d"),
        "pod_chips": _pod(256),
        "ici_ports": _ports(4, "GD"),
        "ici_link_bytes_per_s_one_way": (
            _rate(45, "SB", _FIRST),
            _rate(50, "GD", "derived: 400 GB/s / 4 ports / 2 ways"),
        ),
        "ici_bytes_per_s_bidirectional": (_rate(400, "GD"),),
    },
    "v5p": {
        "topology": _topology("torus3d"),
        "pod_chips": _pod(8960),
        "ici_ports": _ports(6, "GD", _SIX_PORTS),
        "ici_link_bytes_per_s_one_way": (
            _rate(90, "SB", _FIRST),
            _rate(100, "GD", "derived: 1200 GB/s / 6 ports / 2 ways"),
        ),
        "ici_bytes_per_s_bidirectional": (_rate(1200, "GD"),),
        "dcn_bytes_per_s": _dcn(50),
    },
    "v6e": {
        "topology": _topology("torus2d"),
        "pod_chips": _pod(256),
        "ici_ports": _ports(4, "GD"),
        "ici_link_bytes_per_s_one_way": (
            _rate(90, "SB", _FIRST),
            _rate(100, "GD", "derived: 800 GB/s / 4 ports / 2 ways"),
        ),
        "ici_bytes_per_s_bidirectional": (_rate(800, "GD"),),
        "dcn_bytes_per_s": _dcn(100),
    },
    "7x": {
        "topology": _topology("torus3d"),
        "pod_chips": _pod(9216),
        "ici_ports": _ports(6, "GD", _SIX_PORTS),
        "ici_link_bytes_per_s_one_way": (
            _rate(100, "GD", "derived: 1200 GB/s / 6 ports / 2 ways"),
        ),
        "ici_bytes_per_s_bidirectional": (_rate(1200, "GD"),),
        "dcn_bytes_per_s": _dcn(100),
    },
    "8t": {
        "topology": _topology("torus3d", "DD"),
        "pod_chips": _pod(9600, "DD"),
        "ici_ports": _ports(6, "DD", _SIX_PORTS),
        "ici_link_bytes_per_s_one_way": (
            _rate(200, "DD", "derived: 2400 GB/s / 6 ports / 2 ways"),
        ),
        "ici_bytes_per_s_bidirectional": (
            _rate(2400, "DD", "derived: twice Ironwood's 1200 GB/s"),
        ),
        "dcn_bytes_per_s": (
            Fact(
                value=400 * GBIT,
                unit="bytes/s",
                source="DD",
                note="derived, an upper bound: 'up to' 4x Ironwood's 100 Gb/s (Virgo)",
            ),
        ),
    },
    "8i": {
        "topology": _topology("boardfly", "DD"),
        "pod_chips": (
            Fact(value=1024, unit="chips", source="DD", note="'up to' 1024 can be active at once"),
            Fact(value=1152, unit="chips", source="DD", note="connected"),
        ),
        "ici_max_hops": (Fact(value=7, unit="hops", source="DD", note="at most, in a pod"),),
        "ici_bytes_per_s_bidirectional": (
            _rate(2400, "DD", "19.2 Tb/s; ports per chip and rate per link are not published"),
        ),
    },
}
