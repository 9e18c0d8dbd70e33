"""What Python runs when it is given the directory of these modules, a zip file of them, or the installed package:

    python .                    in a clone
    python smsproxy.pyz         the single file
    smsproxy                    the installed command
    python -m smsproxy_service  the same

The modules import each other by their own names, and a provider's client imports `fastsmsing`: their place comes first
on the path. Any Python from 3.6 on can read this file, so that an old one gets a sentence and no traceback.
"""
import sys

if sys.version_info < (3, 10):  # the Python that it is started with may be any
    sys.exit("smsproxy needs Python 3.10 or newer")

import os
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports is no traceback
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from main import main

if __name__ == "__main__":
    sys.exit(main())
