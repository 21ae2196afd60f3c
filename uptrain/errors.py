"""The errors that uptrain raises; each message says what was found, what was expected and the way out."""


class UptrainError(Exception):
    """Any error of the data, the checkpoint or the machine that a user can act on."""


class CheckpointError(UptrainError):
    """A checkpoint folder that cannot be read, or a target that cannot be written."""


class UnsupportedFamilyError(UptrainError):
    """An architecture, or one of its tensors, that has no conversion rule."""


class HeadCountError(UptrainError):
    """A number of key/value heads that the checkpoint cannot be converted to."""


class DataError(UptrainError):
    """Text that cannot be read, or that is too short for what is asked of it."""


class TrainingError(UptrainError):
    """A training run that cannot start or cannot go on."""


class RecipeError(UptrainError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class OptionError(UptrainError):
    """A choice that is unknown, or that another one excludes."""


class Interrupted(UptrainError):
    """The user or the system asked to stop; what was done is saved and can be resumed."""


def one_line(error: object) -> str:
    """Say in one line what an error of another library says, 200 characters at most."""
    return " ".join(str(error).split())[:200] or type(error).__name__
