"""What a user can get wrong: every error whose message alone says what to do. Anything else is shown with a traceback.

UserError              what was asked for cannot be done
├─ FusionError         the fusion file, or a model that it names
├─ GateError           a gate's file
├─ DraftHeadError      a draft head's folder
└─ CommandError        what a command is asked for: a flag, a folder
   ├─ DataError        a file of conversations, of a test set, of a benchmark
   ├─ TrainError       a training run
   │  ├─ SamplerError
   │  └─ NonFiniteLossError
   ├─ EndpointError    a server that is asked
   ├─ DomainError      a file that describes a domain
   └─ StoreError       the folder of a run of `ultrafuser data`

On the serving side, `SettingsError` is a CommandError and `EngineOptionError` a UserError. Knows no module of this
package, so that all may raise them.
"""


class UserError(ValueError):
    """One line: what is wrong (a key, a flag, a file and line of it), and the way out."""


class FusionError(UserError):
    """Something in the fusion file is wrong: `KEY: what is wrong; way out`."""


class GateError(UserError):
    """A gate file does not fit the specialists; names the file and the key."""


class DraftHeadError(UserError):
    """A draft head does not fit the fusion; names the folder and the key."""


class CommandError(UserError):
    """A command cannot do what it was asked for; names the flag, file or field."""


class DataError(CommandError):
    """Data cannot be used; names the file or the domain."""


class TrainError(CommandError):
    """A training run cannot be started or go on; names the setting."""


class SamplerError(TrainError):
    """The rows of a step cannot be shared out evenly."""


class NonFiniteLossError(TrainError):
    """The loss or its gradient is not a number; the parameters are those of the step before."""


class EndpointError(CommandError):
    """No request to a server can succeed; names the setting."""


class DomainError(CommandError):
    """A domain's file cannot be used; names the file and the key."""


class StoreError(CommandError):
    """The folder of a run of `ultrafuser data` cannot be read; names the file."""
