"""The only folder that knows Ray. `play` and `untrained` do without."""

import os

# Read when ray is imported. Ray would give each worker an environment of its own, a `uv run` of
# many seconds a process, because the driver came by `uv run`; here they share the driver's, and
# on a cluster every node has one.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
