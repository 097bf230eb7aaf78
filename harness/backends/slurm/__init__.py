"""Jobs on the nodes of a Slurm cluster: they outlive the control plane, and another one takes them up.

`site` reads what a person knows of the cluster, `script` makes the sbatch script, `client` calls Slurm's programs,
`outcome` turns their words and the script's into an `Outcome`, `backend` brings these together.
"""

from harness.backends.slurm.backend import Slurm, open_backend

__all__ = ["Slurm", "open_backend"]
