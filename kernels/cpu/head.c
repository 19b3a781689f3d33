/* The output head and sampling, for the rows that a sample names; HEAD_ROWS rows at a time, so that logits of a large batch need not exist at once.
 * A row of which only the highest logit is asked (greedy, nothing adjusted, nothing reported) writes no logits: the product keeps its maximum. */
#include <float.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

uint32_t head_units(const struct cpu *cpu) { return (cpu->head.n_strips + HEAD_STRIPS - 1) / HEAD_STRIPS; }

static uint32_t rows_of_chunk(const struct cpu *cpu, uint32_t first) {
    return cpu->n_head_rows - first < HEAD_ROWS ? cpu->n_head_rows - first : HEAD_ROWS;
}

uint32_t samples_of_chunk(const struct cpu *cpu, uint32_t first_row, uint32_t *first_sample) {
    uint32_t end_row = first_row + rows_of_chunk(cpu, first_row), first = *first_sample;
    while (*first_sample < cpu->batch->n_samples && cpu->sample_row[*first_sample] < end_row) ++*first_sample;
    return *first_sample - first;
}

/* Samples ascend by row: the first of those whose row is in the chunk. */
static uint32_t first_sample_of(const struct cpu *cpu, uint32_t first_row) {
    uint32_t low = 0, high = cpu->batch->n_samples;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (cpu->sample_row[middle] < first_row)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void stage_head_norm(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    const struct program *p = cpu->program;
    float *out = cpu->workers_scratch[worker].row;
    for (uint32_t i = first; i < end; i++) {
        cpu->isa->norm(cpu->x + (size_t)cpu->head_rows[stage->index + i] * p->n_embd, cpu->head_norm, p->n_embd, p->norm_epsilon, out);
        put_row(cpu, &cpu->z, i, out, p->n_embd);
    }
}

void stage_head_product(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const uint32_t n = rows_of_chunk(cpu, stage->index), n_strips = cpu->head.n_strips, n_vocab = cpu->program->n_vocab;
    const bool *plain = cpu->plain + stage->index;
    float y[HEAD_ROWS][STRIP_ROWS];
    struct best_logits best[HEAD_ROWS];
    if (own->best_stage != stage || own->best_step != cpu->stages_before) {
        for (uint32_t r = 0; r < n; r++) own->best[r] = -__builtin_inff(), own->best_token[r] = 0;
        own->best_stage = stage;
        own->best_step = cpu->stages_before;
    }
    for (uint32_t r = 0; r < n; r++) best_logits_clear(&best[r]);
    for (uint32_t strip = first * HEAD_STRIPS; strip < end * HEAD_STRIPS && strip < n_strips; strip++) {
        multiply_strip(cpu, &cpu->head, strip, &cpu->z, 0, n, y);
        if ((strip + 1) * STRIP_ROWS > n_vocab)
            for (uint32_t r = 0; r < n; r++)
                for (uint32_t i = n_vocab - strip * STRIP_ROWS; i < STRIP_ROWS; i++) y[r][i] = -__builtin_inff();
        for (uint32_t r = 0; r < n; r++) {
            if (plain[r])
                cpu->isa->track(y[r], strip, &best[r]);
            else
                memcpy(cpu->logits + r * cpu->logits_stride + strip * STRIP_ROWS, y[r], sizeof y[r]);
        }
    }
    for (uint32_t r = 0; r < n; r++)
        for (uint32_t i = 0; plain[r] && i < STRIP_ROWS; i++) {
            uint32_t token = best[r].strip[i] * STRIP_ROWS + i;
            if (best[r].value[i] > own->best[r] || (best[r].value[i] == own->best[r] && token < own->best_token[r])) {
                own->best[r] = best[r].value[i];
                own->best_token[r] = token;
            }
        }
}

/* All logits of row r of the chunk into the worker's copy. */
static void copy_logits(struct cpu *cpu, uint32_t r, bool written, float *logits) {
    if (written) {
        memcpy(logits, cpu->logits + r * cpu->logits_stride, cpu->program->n_vocab * sizeof *logits);
        return;
    }
    for (uint32_t strip = 0; strip < cpu->head.n_strips; strip++) {
        float y[1][STRIP_ROWS];
        multiply_strip(cpu, &cpu->head, strip, &cpu->z, r, 1, y);
        uint32_t left = cpu->program->n_vocab - strip * STRIP_ROWS;
        memcpy(logits + (size_t)strip * STRIP_ROWS, y[0], (left < STRIP_ROWS ? left : STRIP_ROWS) * sizeof *logits);
    }
}

void stage_sample(void *context, const struct stage *stage, uint32_t first, uint32_t end, uint32_t worker) {
    struct cpu *cpu = context;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    const uint32_t n_vocab = cpu->program->n_vocab, first_sample = first_sample_of(cpu, stage->index);
    for (uint32_t sample = first_sample + first; sample < first_sample + end; sample++) {
        const uint32_t row = cpu->sample_row[sample], r = row - stage->index;
        bool plain = cpu->plain[row];
        if (plain) {
            float best = -__builtin_inff();
            uint32_t token = 0;
            for (uint32_t w = 0; w < workers_count(cpu->workers); w++) {
                const struct worker_scratch *other = &cpu->workers_scratch[w];
                if (other->best_stage != stage - 1 || other->best_step != cpu->stages_before) continue;
                if (other->best[r] > best || (other->best[r] == best && other->best_token[r] < token))
                    best = other->best[r], token = other->best_token[r];
            }
            /* Infinities are the sampler's business: it looks at the logits, which are made again. */
            if (best >= -FLT_MAX && best <= FLT_MAX) {
                cpu->results[sample] = (struct sample_result){.token = (int32_t)token};
                continue;
            }
        }
        copy_logits(cpu, r, !plain, own->logits);
        if (cpu->tap) memcpy(cpu->tap + (size_t)sample * n_vocab, own->logits, n_vocab * sizeof(float));
        sampler_sample(&cpu->batch->samples[sample], own->logits, n_vocab, own->sampler, &cpu->results[sample]);
    }
}
