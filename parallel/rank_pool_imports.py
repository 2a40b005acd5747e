"""What a rank of the pool needs; imported once, by the server that the ranks are forked from."""

import torch
import torch.distributed  # noqa: F401

from parallel import buckets, cross_entropy, gradients, optimizer, p2p  # noqa: F401
