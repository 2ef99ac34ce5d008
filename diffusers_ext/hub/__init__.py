"""Models between this machine and the Hub: `push` and `pull`, and `export` for a folder that is a repository."""

from diffusers_ext.hub.client import HubError, PushConflictError
from diffusers_ext.hub.export import export
from diffusers_ext.hub.remote import pull, push
from diffusers_ext.hub.safety import UnsafeRepositoryError


__all__ = ["HubError", "PushConflictError", "UnsafeRepositoryError", "export", "pull", "push"]
