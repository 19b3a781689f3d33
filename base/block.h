/* The one number that the allocator, the kernels and the scheduler agree on: slots of a KV block. A build-time constant. */
#pragma once

#define BLOCK_TOKENS 32
