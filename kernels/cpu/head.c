/* The output head and sampling, for the rows that a sample names; HEAD_ROWS rows at a time, so that logits of a large batch need not exist at once. */
#include <string.h>

#include "kernels/cpu/cpu.h"

static void normalise_rows(struct cpu *cpu, uint32_t first, uint32_t n, uint32_t worker) {
    const struct program *p = cpu->program;
    struct worker_scratch *own = &cpu->workers_scratch[worker];
    struct share share = share_of(cpu, n, false, worker);
    for (uint32_t i; share_next(cpu, &share, &i);) {
        float *out = cpu->z.values ? cpu->z.values + i * cpu->z.value_stride : own->row;
        cpu->isa->norm(cpu->x + (size_t)cpu->head_rows[first + i] * p->n_embd, cpu->head_norm, p->n_embd, p->norm_epsilon, out);
        if (cpu->z.blocks) cpu->isa->quantize(out, p->n_embd / PANEL_K, cpu->z.blocks + i * cpu->z.block_stride);
    }
    workers_barrier(cpu->workers);
}

static void head_product(struct cpu *cpu, uint32_t n, uint32_t worker) {
    const struct panel *head = &cpu->head;
    bool is_float = panel_is_float(head->type);
    const void *first = is_float ? (const void *)cpu->z.values : cpu->z.blocks;
    size_t stride = is_float ? cpu->z.value_stride * sizeof(float) : cpu->z.block_stride * sizeof(struct act_block);
    float y[HEAD_ROWS][STRIP_ROWS];
    enum { STRIPS = 16 };
    uint32_t n_units = (head->n_strips + STRIPS - 1) / STRIPS;
    struct share share = share_of(cpu, n_units, true, worker);
    for (uint32_t unit; share_next(cpu, &share, &unit);)
        for (uint32_t strip = unit * STRIPS; strip < head->n_strips && strip < (unit + 1) * STRIPS; strip++) {
            cpu->isa->product[head->type](head->data + strip * head->strip_bytes, head->n_blocks, first, stride, n, y);
            for (uint32_t r = 0; r < n; r++) memcpy(cpu->logits + r * cpu->logits_stride + strip * STRIP_ROWS, y[r], sizeof y[r]);
        }
    workers_barrier(cpu->workers);
}

void phase_head(struct cpu *cpu, uint32_t worker) {
    const uint32_t n_vocab = cpu->program->n_vocab;
    const struct batch *batch = cpu->batch;
    uint32_t first_sample = 0; /* samples ascend by row, and so by chunk */
    for (uint32_t first = 0; first < cpu->n_head_rows; first += HEAD_ROWS) {
        uint32_t n = cpu->n_head_rows - first < HEAD_ROWS ? cpu->n_head_rows - first : HEAD_ROWS, end_sample = first_sample;
        normalise_rows(cpu, first, n, worker);
        head_product(cpu, n, worker);
        while (end_sample < batch->n_samples && cpu->sample_row[end_sample] < first + n) end_sample++;
        struct share share = share_of(cpu, end_sample - first_sample, true, worker);
        struct worker_scratch *own = &cpu->workers_scratch[worker];
        for (uint32_t i; share_next(cpu, &share, &i);) {
            uint32_t sample = first_sample + i;
            const float *logits = cpu->logits + (cpu->sample_row[sample] - first) * cpu->logits_stride;
            if (cpu->tap) memcpy(cpu->tap + (size_t)sample * n_vocab, logits, n_vocab * sizeof(float));
            memcpy(own->logits, logits, n_vocab * sizeof(float));
            sampler_sample(&batch->samples[sample], own->logits, n_vocab, own->sampler, &cpu->results[sample]);
        }
        workers_barrier(cpu->workers);
        first_sample = end_sample;
    }
}
