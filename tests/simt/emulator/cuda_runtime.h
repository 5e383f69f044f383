// Everything a kernel needs from here has been included before its first line.
#pragma once
#include "simt.h"
