"""The one error that says: what you gave cannot be used."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a record, a folder, a combination of options.

    The message is one line that names the file, record and line or key, says what is allowed, and what to do. The
    command line prints it after `error:` and exits with 1; a library user can catch it as a ValueError.
    """
