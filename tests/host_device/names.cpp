/* Names of functions by address, from the program's own symbol table: static ones too, which dladdr() does not know. Used where a kernel's bug is reported. */
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/host_device/execution_state.h"

/* Where the program was loaded: the first object of the list. */
static int first_base(struct dl_phdr_info *info, size_t, void *base) {
    *(uintptr_t *)base = (uintptr_t)info->dlpi_addr;
    return 1;
}

static const char *find(const uint8_t *file, uintptr_t address) {
    const ElfW(Ehdr) *header = (const ElfW(Ehdr) *)file;
    const ElfW(Shdr) *sections = (const ElfW(Shdr) *)(file + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const ElfW(Sym) *symbols = (const ElfW(Sym) *)(file + sections[i].sh_offset);
        const char *names = (const char *)file + sections[sections[i].sh_link].sh_offset;
        for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
            if (symbols[s].st_value == address && (symbols[s].st_info & 15) == STT_FUNC) return names + symbols[s].st_name;
    }
    return NULL;
}

void host_name_of(const void *function, char *name, size_t bytes) {
    uintptr_t base = 0;
    (void)dl_iterate_phdr(first_base, &base);
    (void)snprintf(name, bytes, "kernel at %p", function);
    const int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (file < 0 || fstat(file, &about) != 0) return;
    void *mapped = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    (void)close(file);
    if (mapped == MAP_FAILED) return;
    const char *symbol = find((const uint8_t *)mapped, (uintptr_t)function - base);
    int status = 0;
    char *readable = symbol ? abi::__cxa_demangle(symbol, NULL, NULL, &status) : NULL;
    if (symbol) (void)snprintf(name, bytes, "%s", readable ? readable : symbol);
    free(readable);
    (void)munmap(mapped, (size_t)about.st_size);
}
