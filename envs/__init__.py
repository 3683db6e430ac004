"""Gymnasium environments that compress networks. `gymnasium.make("envs:rlcompress/Compression-v0",
problem=...)` imports this package, which registers them."""

from gymnasium import register, registry

ID = "rlcompress/Compression-v0"

if ID not in registry:
    register(id=ID, entry_point="envs.compression:CompressionEnv", disable_env_checker=True)
