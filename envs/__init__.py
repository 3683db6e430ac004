"""Gymnasium environments that compress networks. `gymnasium.make("envs:rlcompress/Compression-v0",
problem=...)` imports this package, which registers them; so does `gymnasium.make_vec`."""

from gymnasium import register, registry

ID = "rlcompress/Compression-v0"
DYNAMIC_ID = "rlcompress/DynamicCompression-v0"
ZOO_ID = "rlcompress/Zoo-v0"

if ID not in registry:
    register(
        id=ID,
        entry_point="envs.compression:CompressionEnv",
        vector_entry_point="envs.vector:CompressionVectorEnv",
        disable_env_checker=True,
    )

if DYNAMIC_ID not in registry:
    register(
        id=DYNAMIC_ID,
        entry_point="envs.dynamic:DynamicCompressionEnv",
        disable_env_checker=True,
    )

if ZOO_ID not in registry:
    register(id=ZOO_ID, entry_point="envs.zoo:ZooEnv", disable_env_checker=True)
