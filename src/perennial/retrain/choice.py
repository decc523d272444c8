"""Which launcher do the settings name?"""

from perennial.retrain.launchers import SPEC, Launcher, LocalLauncher
from perennial.settings import Settings


def launcher(settings: Settings) -> Launcher:
    """The one constructor that says where pipelines run: here, in a Job, or by a KFP backend."""
    if settings.launcher == "job":
        from perennial.retrain.job import JobLauncher

        return JobLauncher(settings)
    if settings.launcher == "kfp":
        from perennial.retrain.remote import KfpLauncher

        return KfpLauncher(settings)
    return LocalLauncher(settings, settings.root / SPEC)
