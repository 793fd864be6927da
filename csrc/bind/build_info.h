// What the extension was built from and for, as JSON; the build writes the definition (setup.py).
#pragma once

extern "C" const char foldkv_build_info[];
