"""What all tests share: the framework's quiet, and graph mode as in use."""

import os

os.environ.setdefault("GLOG_v", "3")
