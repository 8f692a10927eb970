#include "votes.h"
