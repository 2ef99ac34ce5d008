"""Models between this machine and the Hub: `push`, `pull`, and `export` for a folder that is a repository.
`push_space` publishes the demo."""

from diffusers_ext.hub.client import HubError, PushConflictError
from diffusers_ext.hub.export import export
from diffusers_ext.hub.remote import pull, push
from diffusers_ext.hub.safety import UnsafeRepositoryError
from diffusers_ext.hub.spaces import push_space


__all__ = ["HubError", "PushConflictError", "UnsafeRepositoryError", "export", "pull", "push", "push_space"]
