/* stand-in */
#include "cli/eval.h"
enum status eval_write_svg(const struct eval *eval, const char *path, struct error *error) {
    (void)eval;
    return error_set(error, STATUS_IO, "%s", path);
}
