"""Reformers from elsewhere, one a file, behind the settings of ours; imported when first built.

Their packages are the extra `peers`. A setting that a peer cannot take is refused, never passed over, so
that a record says what was computed.
"""

from __future__ import annotations

from harness.peers.peer import Peer, PeerModel
from harness.peers.reformer_pytorch import REFORMER_PYTORCH
from harness.peers.transformers import TRANSFORMERS

__all__ = ["IMPLEMENTATIONS", "OURS", "PEERS", "Peer", "PeerModel", "check_implementation", "versions"]

OURS = "ours"

#: By the name of the implementation, which is that of the package.
PEERS = {peer.name: peer for peer in (TRANSFORMERS, REFORMER_PYTORCH)}
IMPLEMENTATIONS = (OURS, *PEERS)


def check_implementation(name: str) -> None:
    """Refuse an implementation that nobody knows.

    Raises:
        ValueError: names it and the known ones.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"workload.implementation={name!r}: use one of {', '.join(IMPLEMENTATIONS)}")


def versions(name: str) -> dict[str, str]:
    """What a record tells of an implementation that is not ours."""
    return {"peer_version": f"{name} {PEERS[name].version}"} if name in PEERS else {}
