"""Start-up file of child Python processes (see `medbridge.torchvision_ops.prepare_children`)."""

from medbridge.declare_first import declare_first

declare_first()
