# Helpers of the build: rooms, tests, per-instruction-set files, warnings and sanitizers.

add_library(kvasir_flags INTERFACE)
target_include_directories(kvasir_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_definitions(kvasir_flags INTERFACE _GNU_SOURCE KVASIR_VERSION="${PROJECT_VERSION}")
# nvcc: -std by hand, as CMake 3.25 knows no C++20 for it.
# -fmacro-prefix-map: a CHECK that fails names its file from here on, not where somebody built it.
# -ffp-contract=off: a multiply-add is fused only where the code says so, so that results do not depend on the compiler's mood.
target_compile_options(kvasir_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C>:-Wall -Wextra -Wshadow -Wconversion -Wvla -fno-math-errno -ffp-contract=off>
  $<$<COMPILE_LANGUAGE:C,CXX>:-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -fno-rtti>
  $<$<AND:$<COMPILE_LANGUAGE:C,CXX>,$<CONFIG:Release>>:-O2 -g -fstack-protector-strong>
  $<$<AND:$<COMPILE_LANGUAGE:C,CXX>,$<CONFIG:Debug>>:-O0 -g3>
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -O3 -lineinfo -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-ffp-contract=off,-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>)
if(KVASIR_WERROR)
  target_compile_options(kvasir_flags INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
if(KVASIR_SANITIZE)
  # -g1: lines without variables, as reports show them, in three quarters of the compiler's time.
  target_compile_options(kvasir_flags INTERFACE -fsanitize=${KVASIR_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer $<$<CONFIG:Release>:-g1>)
  target_link_options(kvasir_flags INTERFACE -fsanitize=${KVASIR_SANITIZE})
  target_compile_definitions(kvasir_flags INTERFACE KVASIR_SANITIZED=1)
else()
  target_compile_definitions(kvasir_flags INTERFACE $<$<CONFIG:Release>:_FORTIFY_SOURCE=2>)
endif()
if(KVASIR_FUZZ)
  target_compile_options(kvasir_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
# Release keeps CHECK() and drops nothing else that tests rely on: no -DNDEBUG effects in our code.

# kvasir_room(name ROOMS a b PACKAGES p q): library of every source below the folder, linked to these rooms only.
function(kvasir_room name)
  cmake_parse_arguments(R "" "" "ROOMS;PACKAGES" ${ARGN})
  set(patterns ${CMAKE_SOURCE_DIR}/${name}/*.c ${CMAKE_SOURCE_DIR}/${name}/*.cpp)
  if(KVASIR_HAVE_CUDA)
    list(APPEND patterns ${CMAKE_SOURCE_DIR}/${name}/*.cu)
  endif()
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${patterns})
  list(REMOVE_ITEM sources ${CMAKE_SOURCE_DIR}/cli/main.c)
  list(TRANSFORM R_ROOMS PREPEND kvasir_)
  if(sources)
    add_library(kvasir_${name} STATIC ${sources})
    target_link_libraries(kvasir_${name} PUBLIC kvasir_flags ${R_ROOMS} PRIVATE ${R_PACKAGES})
    target_link_libraries(kvasir_${name} PUBLIC Threads::Threads m)
    foreach(source ${sources})
      kvasir_instruction_set(${source})
    endforeach()
  else()
    add_library(kvasir_${name} INTERFACE)
    target_link_libraries(kvasir_${name} INTERFACE kvasir_flags ${R_ROOMS})
  endif()
endfunction()

# Loops over all slots of a sequence, between two steps: worth vectors (kernels/select.c).
# One translation unit an instruction set, by the file's suffix: *_generic.c, *_avx2.c, *_avxvnni.c, *_avx512.c (AVX-512 VNNI), *_avx512bf16.c.
# So much is inlined in them that to follow their variables is more than half of the compiler's work: -g1.
function(kvasir_instruction_set source)
  set(avx2 "-mavx2;-mfma;-mf16c")
  set(optimise -O3 "$<$<CONFIG:Release>:-g1>")
  set(generic "$<$<CONFIG:Release>:-g1>")
  if(KVASIR_SANITIZE)
    list(TRANSFORM optimise REPLACE -O3 -O1) # a sanitized -O3 build of these files takes minutes each
    list(PREPEND generic -O1)
  endif()
  set(plain)
  if(KVASIR_FUZZ)
    set(plain -fno-sanitize=all -fno-sanitize=fuzzer-no-link) # minutes each even so, and no boundary: what fuzz targets run of kernels is `reference` and `generic`
  endif()
  set(avx512 "${avx2};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni")
  if(source MATCHES "_generic\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${generic}")
  elseif(source MATCHES "/select\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${optimise}")
  elseif(source MATCHES "_avx2\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${avx2};${optimise};${plain}")
  elseif(source MATCHES "_avxvnni\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${avx2};-mavxvnni;${optimise};${plain}")
  elseif(source MATCHES "_avx512\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${avx512};${optimise};${plain}")
  elseif(source MATCHES "_avx512bf16\\.c$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${avx512};-mavx512bf16;${optimise};${plain}")
  endif()
endfunction()
