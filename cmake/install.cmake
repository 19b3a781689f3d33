# cmake --install: the program, its manual, the unit with this prefix in it, the example configuration, completion and dashboards.
include(GNUInstallDirs)
if(NOT TARGET kvasir)
  return()
endif()
install(TARGETS kvasir RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
if(KVASIR_HAVE_CUDA) # cuBLASLt may lie where the loader does not look
  set_target_properties(kvasir PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
endif()
install(FILES deploy/kvasir.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES deploy/kvasir.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME kvasir)
install(FILES deploy/kvasir.toml README.md LICENSE deploy/prometheus/prometheus.yml deploy/prometheus/alerts.yml deploy/grafana/kvasir.json
        DESTINATION ${CMAKE_INSTALL_DOCDIR})

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS deploy/kvasir.service)
file(READ deploy/kvasir.service unit)
string(REPLACE "/usr/bin/" "${CMAKE_INSTALL_FULL_BINDIR}/" unit "${unit}")
string(REPLACE "/etc/kvasir/" "${CMAKE_INSTALL_FULL_SYSCONFDIR}/kvasir/" unit "${unit}")
file(WRITE ${CMAKE_BINARY_DIR}/kvasir.service "${unit}")
install(FILES ${CMAKE_BINARY_DIR}/kvasir.service DESTINATION lib/systemd/system)

# The configuration belongs to whoever edited it: an existing one stays.
install(CODE "
  set(target \"\$ENV{DESTDIR}${CMAKE_INSTALL_FULL_SYSCONFDIR}/kvasir/kvasir.toml\")
  if(EXISTS \"\${target}\")
    message(STATUS \"Kept: \${target}\")
  else()
    message(STATUS \"Installing: \${target}\")
    configure_file(\"${CMAKE_SOURCE_DIR}/deploy/kvasir.toml\" \"\${target}\" COPYONLY)
  endif()")
