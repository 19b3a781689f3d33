/* Three pictures in one SVG file: KL against the memory of the cache, for all policies, the tokens that kv_compress keeps in each head of each layer, and the hit rate of each head
 * under snapkv and kv_compress. Reads only; main thread.
 * Deliberately plain: no script, no style sheet, fonts of the viewer. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/buffer.h"
#include "cli/eval.h"

#define WIDTH 940.0
#define LEFT 78.0 /* of the plot's frame */
#define RIGHT 910.0
#define TOP 84.0
#define BOTTOM 500.0
#define GUTTER 176.0 /* inside the frame, for the names of the lines */
#define NAME_STEP 17.0
#define KL_LEAST 1e-6 /* what is exactly 0 stands here */
#define INK "#1f2933"
#define FAINT "#6b7785"
#define GRID "#e3e7ec"
#define ACCENT "#c2410c" /* kv_compress */

static const char *const colours[] = {"#64748b", "#0f766e", "#2563eb", "#7c3aed", "#be185d", "#4d7c0f",
                                      "#0891b2", "#854d0e", "#334155", "#c026d3", "#15803d", "#4338ca"};
static const char *const dashes[] = {"", " stroke-dasharray=\"7 3\"", " stroke-dasharray=\"2 3\""};

struct picture {
    const struct eval *eval;
    struct buffer out;
    double mib_block;     /* MiB of one block */
    double x_low, x_high; /* log2 of MiB */
    double y_low, y_high; /* log10 of KL */
};

static bool is_kv_compress(const struct eval_cell *cell) { return strcmp(cell->policy->name, "kv_compress") == 0; }

static void put_escaped(struct buffer *out, const char *text) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '<' || c == '&' || c == '>' || c == '"')
            buffer_printf(out, "&#%d;", c);
        else
            buffer_append_byte(out, (char)(c < 0x20 || c == 0x7f ? '?' : c));
    }
}

static void put_text(struct buffer *out, double x, double y, const char *anchor, int size, const char *colour, const char *text) {
    buffer_printf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" font-size=\"%d\" fill=\"%s\">", x, y, anchor, size, colour);
    put_escaped(out, text);
    buffer_append_text(out, "</text>\n");
}

static void put_line(struct buffer *out, double x1, double y1, double x2, double y2, const char *colour) {
    buffer_printf(out, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x1, y1, x2, y2, colour);
}

/* ---- quality against memory ---- */

static double mean_kl(const struct eval_cell *cell) {
    double kl = eval_mean(cell->window_kl, cell->n_windows);
    return kl > KL_LEAST ? kl : KL_LEAST;
}

static double mebibytes(const struct picture *picture, const struct eval_cell *cell) { return cell->blocks / cell->n_windows * picture->mib_block; }

static double x_of(const struct picture *picture, double mib) {
    return LEFT + GUTTER + (log2(mib) - picture->x_low) / (picture->x_high - picture->x_low) * (RIGHT - LEFT - GUTTER - 24);
}

static double y_of(const struct picture *picture, double kl) {
    return BOTTOM - (log10(kl) - picture->y_low) / (picture->y_high - picture->y_low) * (BOTTOM - TOP);
}

static void set_scales(struct picture *picture) {
    const struct eval *eval = picture->eval;
    picture->x_low = INFINITY, picture->x_high = -INFINITY;
    picture->y_low = INFINITY, picture->y_high = -INFINITY;
    for (uint32_t c = 1; c < eval->n_cells; c++) {
        double x = log2(mebibytes(picture, &eval->cells[c])), y = log10(mean_kl(&eval->cells[c]));
        picture->x_low = x < picture->x_low ? x : picture->x_low;
        picture->x_high = x > picture->x_high ? x : picture->x_high;
        picture->y_low = y < picture->y_low ? y : picture->y_low;
        picture->y_high = y > picture->y_high ? y : picture->y_high;
    }
    if (!(picture->x_high > picture->x_low)) picture->x_low -= 1, picture->x_high += 1;
    double margin = 0.08 * (picture->y_high - picture->y_low) + 0.05;
    picture->y_low -= margin, picture->y_high += margin;
}

static void put_axes(struct picture *picture) {
    struct buffer *out = &picture->out;
    char words[96];
    for (int decade = (int)floor(picture->y_low); decade <= (int)ceil(picture->y_high); decade++)
        for (int step = 1; step <= 5; step = step == 1 ? 2 : step == 2 ? 5 : 6) {
            double kl = step * pow(10, decade), y = y_of(picture, kl);
            if (y < TOP || y > BOTTOM) continue;
            put_line(out, LEFT, y, RIGHT, y, GRID);
            (void)snprintf(words, sizeof words, "%g", kl);
            put_text(out, LEFT - 8, y + 4, "end", 12, FAINT, words);
        }
    for (uint32_t k = 0; k < picture->eval->n_keep; k++) {
        double mib = picture->eval->keep[k] * picture->eval->cells[0].blocks / picture->eval->cells[0].n_windows * picture->mib_block;
        double x = x_of(picture, mib);
        put_line(out, x, TOP, x, BOTTOM, GRID);
        (void)snprintf(words, sizeof words, mib < 10 ? "%.2g MiB" : "%.0f MiB", mib);
        put_text(out, x, BOTTOM + 18, "middle", 12, FAINT, words);
        (void)snprintf(words, sizeof words, "%g %%", 100 * picture->eval->keep[k]);
        put_text(out, x, BOTTOM + 34, "middle", 12, FAINT, words);
    }
    buffer_printf(out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"none\" stroke=\"%s\"/>\n", LEFT, TOP, RIGHT - LEFT,
                  BOTTOM - TOP, FAINT);
    put_text(out, LEFT + GUTTER - 34, BOTTOM + 34, "end", 12, FAINT, "share of the full cache");
    put_text(out, LEFT + GUTTER - 34, BOTTOM + 18, "end", 12, FAINT, "KV of the prompt");
}

struct name {
    uint32_t cell; /* of the line's point with least memory */
    double y;
    uint32_t line;
};

/* From top to bottom, none nearer than NAME_STEP to the one above; pushed up again where that leaves the frame. */
static void spread(struct name *names, uint32_t n) {
    for (uint32_t i = 1; i < n; i++)
        for (uint32_t j = i; j > 0 && names[j].y < names[j - 1].y; j--) {
            struct name other = names[j];
            names[j] = names[j - 1];
            names[j - 1] = other;
        }
    for (uint32_t i = 0; i < n; i++) {
        double least = i ? names[i - 1].y + NAME_STEP : TOP + 12;
        if (names[i].y < least) names[i].y = least;
    }
    for (uint32_t i = n; i-- > 0;) {
        double most = i + 1 < n ? names[i + 1].y - NAME_STEP : BOTTOM - 10;
        if (names[i].y > most) names[i].y = most;
    }
}

static const char *colour_of(const struct eval_cell *cell, uint32_t line) {
    return is_kv_compress(cell) ? ACCENT : colours[line % (sizeof colours / sizeof *colours)];
}

static void put_policy(struct picture *picture, uint32_t first, uint32_t line) {
    const struct eval *eval = picture->eval;
    const struct eval_cell *cells = &eval->cells[first];
    const char *colour = colour_of(cells, line), *dash = is_kv_compress(cells) ? "" : dashes[line % 3];
    struct buffer *out = &picture->out;
    buffer_printf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"%s\"%s points=\"", colour, is_kv_compress(cells) ? "3.2" : "1.5", dash);
    for (uint32_t k = 0; k < eval->n_keep; k++)
        buffer_printf(out, "%.1f,%.1f ", x_of(picture, mebibytes(picture, &cells[k])), y_of(picture, mean_kl(&cells[k])));
    buffer_append_text(out, "\"/>\n");
    for (uint32_t k = 0; k < eval->n_keep; k++)
        buffer_printf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%s\" fill=\"%s\"/>\n", x_of(picture, mebibytes(picture, &cells[k])),
                      y_of(picture, mean_kl(&cells[k])), is_kv_compress(cells) ? "5" : "3", colour);
}

static void put_quality(struct picture *picture) {
    const struct eval *eval = picture->eval;
    struct buffer *out = &picture->out;
    struct name names[EVAL_CELLS_MAX];
    uint32_t lines = (eval->n_cells - 1) / eval->n_keep;
    put_text(out, LEFT, TOP - 14, "start", 14, INK, "KL divergence from the full cache, nats a token (lower is better), against memory");
    if (lines == 0) return;
    set_scales(picture);
    put_axes(picture);
    for (uint32_t line = 0; line < lines; line++) {
        uint32_t first = 1 + line * eval->n_keep, least = first;
        for (uint32_t k = 0; k < eval->n_keep; k++)
            if (eval->keep[k] < eval->cells[least].keep) least = first + k;
        names[line] = (struct name){.cell = least, .y = y_of(picture, mean_kl(&eval->cells[least])), .line = line};
        if (!is_kv_compress(&eval->cells[first])) put_policy(picture, first, line);
    }
    for (uint32_t line = 0; line < lines; line++) /* on top of the others */
        if (is_kv_compress(&eval->cells[1 + line * eval->n_keep])) put_policy(picture, 1 + line * eval->n_keep, line);
    spread(names, lines);
    for (uint32_t i = 0; i < lines; i++) {
        const struct eval_cell *cell = &eval->cells[names[i].cell];
        const char *colour = colour_of(cell, names[i].line);
        double x = x_of(picture, mebibytes(picture, cell)), y = y_of(picture, mean_kl(cell)), end = LEFT + GUTTER - 46;
        buffer_printf(out, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"0.7\" points=\"%.1f,%.1f %.1f,%.1f %.1f,%.1f\"/>\n", colour, end + 4,
                      names[i].y, end + 12, names[i].y, x - 5, y);
        buffer_printf(out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\" font-size=\"13\" fill=\"%s\"%s>%s</text>\n", end, names[i].y + 4, colour,
                      is_kv_compress(cell) ? " font-weight=\"bold\"" : "", cell->policy->name);
    }
}

/* ---- a square for each head: tokens kept, hit rate ---- */

/* White to deep orange. */
static void shade(double share, char colour[8]) {
    static const double low[3] = {255, 247, 237}, middle[3] = {251, 146, 60}, high[3] = {124, 45, 18};
    unsigned rgb[3];
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    for (int i = 0; i < 3; i++) {
        double value = share < 0.5 ? low[i] + (middle[i] - low[i]) * 2 * share : middle[i] + (high[i] - middle[i]) * (2 * share - 1);
        rgb[i] = (unsigned)nearbyint(value) & 255u;
    }
    (void)snprintf(colour, 8, "#%02x%02x%02x", rgb[0], rgb[1], rgb[2]);
}

/* What a square shows: the share that colours it, and in words. */
typedef double head_value(const struct picture *picture, const struct eval_cell *cell, uint32_t lane, char *words, size_t size);

static double kept_of(const struct picture *picture, const struct eval_cell *cell, uint32_t lane, char *words, size_t size) {
    double tokens = cell->kept[lane] / cell->n_windows;
    (void)snprintf(words, size, "%.0f tokens", tokens);
    return tokens / picture->eval->n_prompt;
}

static double hit_rate_of(const struct picture *picture, const struct eval_cell *cell, uint32_t lane, char *words, size_t size) {
    double rate = eval_hit_rate(&cell->hits[lane]);
    (void)picture;
    (void)snprintf(words, size, "hit rate %.1f %%", 100 * rate);
    return rate;
}

static double put_heads(struct picture *picture, const struct eval_cell *cell, head_value *value, double y) {
    const struct program *program = model_program(picture->eval->model);
    struct buffer *out = &picture->out;
    double width = (RIGHT - LEFT) / program->n_layers, height = program->n_kv_heads <= 4   ? 20
                                                                : program->n_kv_heads <= 8 ? 13
                                                                                           : 80.0 / program->n_kv_heads;
    char words[128], colour[8];
    (void)snprintf(words, sizeof words, "%s, kept %g %%", cell->policy->name, 100 * cell->keep);
    put_text(out, LEFT, y - 6, "start", 12, INK, words);
    for (uint32_t head = 0; head < program->n_kv_heads; head++) {
        for (uint32_t layer = 0; layer < program->n_layers; layer++) {
            shade(value(picture, cell, layer * program->n_kv_heads + head, words, sizeof words), colour);
            buffer_printf(out,
                          "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"><title>layer %" PRIu32 ", head %" PRIu32
                          ": %s</title></rect>\n",
                          LEFT + layer * width, y + head * height, width - 1, height - 1, colour, layer, head, words);
        }
        (void)snprintf(words, sizeof words, "head %" PRIu32, head);
        if (height >= 12) put_text(out, LEFT - 8, y + (head + 0.5) * height + 4, "end", 11, FAINT, words);
    }
    y += program->n_kv_heads * height;
    for (uint32_t layer = 0; layer<program->n_layers; layer += program->n_layers> 16 ? 5 : 1) {
        (void)snprintf(words, sizeof words, layer ? "%" PRIu32 : "layer %" PRIu32, layer);
        put_text(out, LEFT + (layer + 0.5) * width, y + 13, layer ? "middle" : "start", 11, FAINT, words);
    }
    return y + 44;
}

/* A heading with the scale of colours, from 0 to `most`. Returns where what it stands over begins. */
static double put_heading(struct buffer *out, const char *words, const char *most, double y) {
    char colour[8];
    put_text(out, LEFT, y, "start", 14, INK, words);
    for (int i = 0; i < 100; i++) { /* the scale */
        shade(i / 99.0, colour);
        buffer_printf(out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"1.7\" height=\"10\" fill=\"%s\"/>\n", RIGHT - 190 + i * 1.5, y - 10, colour);
    }
    put_text(out, RIGHT - 196, y, "end", 11, FAINT, "0");
    put_text(out, RIGHT, y, "end", 11, FAINT, most);
    return y + 32;
}

static double put_kept(struct picture *picture, double y) {
    const struct eval *eval = picture->eval;
    char words[160], most[16];
    (void)snprintf(words, sizeof words, "Tokens that kv_compress keeps of %" PRIu32 ", by layer and KV head (mean over windows)", eval->n_prompt);
    (void)snprintf(most, sizeof most, "%" PRIu32, eval->n_prompt);
    y = put_heading(&picture->out, words, most, y);
    for (uint32_t c = 1; c < eval->n_cells; c++)
        if (is_kv_compress(&eval->cells[c])) y = put_heads(picture, &eval->cells[c], kept_of, y);
    return y;
}

/* The policy that the rate was made for, and the one to compare it with. */
static bool shows_hits(const struct eval_cell *cell) { return is_kv_compress(cell) || strcmp(cell->policy->name, "snapkv") == 0; }

static double put_hits(struct picture *picture, double y) {
    const struct eval *eval = picture->eval;
    y = put_heading(&picture->out, "Hit rate: attention pairs of the prompt's last rows that were kept, by layer and KV head", "100 %", y);
    for (uint32_t c = 1; c < eval->n_cells; c++)
        if (shows_hits(&eval->cells[c])) y = put_heads(picture, &eval->cells[c], hit_rate_of, y);
    return y;
}

enum status eval_write_svg(const struct eval *eval, const char *path, struct error *error) {
    struct picture picture = {.eval = eval, .mib_block = (double)lab_block_bytes(eval->lab) / 0x1p20};
    struct buffer *body = &picture.out, head = {0};
    char words[192];
    bool heads = false, hits = false;
    for (uint32_t c = 1; c < eval->n_cells; c++) heads |= is_kv_compress(&eval->cells[c]), hits |= shows_hits(&eval->cells[c]);
    put_text(body, LEFT, 30, "start", 18, INK, model_name(eval->model));
    (void)snprintf(words, sizeof words, "%" PRIu32 " window%s of %" PRIu32 " tokens and the %u after; KV %s%s", eval->config->eval.windows,
                   eval->config->eval.windows == 1 ? "" : "s", eval->n_prompt, EVAL_GOLD, kv_dtype_name(lab_kv_dtype(eval->lab)),
                   eval->text.made_up ? "; text made up" : "");
    put_text(body, LEFT, 50, "start", 12, FAINT, words);
    put_quality(&picture);
    double height = BOTTOM + 56;
    if (heads) height = put_kept(&picture, height + 20);
    if (hits) height = put_hits(&picture, height + 20);
    buffer_printf(
        &head,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" font-family=\"Helvetica, Arial, "
        "sans-serif\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
        WIDTH, height, WIDTH, height);
    FILE *file = fopen(path, "wb");
    bool written = file && fwrite(head.bytes, 1, head.length, file) == head.length && fwrite(body->bytes, 1, body->length, file) == body->length &&
                   fputs("</svg>\n", file) >= 0;
    int number = errno;
    if (file && fclose(file) != 0 && written) written = false, number = errno;
    buffer_done(&head);
    buffer_done(body);
    return written ? STATUS_OK : error_set(error, STATUS_IO, "--svg: %.300s: %s", path, strerror(number));
}
