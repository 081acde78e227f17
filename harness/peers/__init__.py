"""Attention layers from elsewhere, one a file, behind the settings of ours; imported when first built.

Their packages are the extra `peers`. A setting that a peer cannot take is refused, never passed over, so
that a record says what was computed.
"""

from __future__ import annotations

from harness.peers.peer import Peer
from harness.peers.reformer_pytorch import REFORMER_PYTORCH
from harness.peers.transformers import TRANSFORMERS

__all__ = ["PEERS", "Peer"]

#: By the name of the implementation, which is that of the package.
PEERS = {peer.name: peer for peer in (TRANSFORMERS, REFORMER_PYTORCH)}
