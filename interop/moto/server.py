# Moto as a server, so that the AWS SDK for Go can read its answers: ECS says cpu
# and memory of a container as strings, moto as numbers.
import sys

import moto.ecs.models as ecs

init = ecs.Container.__init__


def with_strings(self, *args, **kwargs):
    init(self, *args, **kwargs)
    for name in ("cpu", "memory"):
        value = getattr(self, name)
        if value is not None:
            setattr(self, name, str(value))


ecs.Container.__init__ = with_strings

from moto.server import main  # noqa: E402

main(sys.argv[1:])
