"""Errors of hypercalls, negative as they are returned (Xen, xen/include/public/errno.h)."""

from typing import Final

__all__ = ["EFAULT", "EINVAL", "ENOSYS", "EPERM", "ESRCH"]

EPERM: Final = -1
ESRCH: Final = -3
EFAULT: Final = -14
EINVAL: Final = -22
ENOSYS: Final = -38
