import sys

from pyzoo.cli import main

sys.exit(main())
