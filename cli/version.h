/* Which build this is. */
#pragma once

/* The commit it was configured from, short; "unknown" outside a git checkout. */
const char *version_commit(void);
