# longrope_copy_and_patch(SOURCE DESTINATION PATCH_DIR)
#
# Makes DESTINATION a copy of the parts of SOURCE that a build needs, with PATCH_DIR/src/* added to
# its src/ and the patches named in PATCH_DIR/series applied in that order. An empty PATCH_DIR
# gives a plain copy. Sets LONGROPE_PATCH_LABEL: "stock", or "longrope-" and a hash of the patches.
#
# Works on a staging folder and then copies only what differs, so a changed patch recompiles only
# the files that it touches, and a run that was killed half-way is repaired by the next one.

function(longrope_copy_and_patch SOURCE DESTINATION PATCH_DIR)
    set(staging "${DESTINATION}.staging")
    file(REMOVE_RECURSE "${staging}")
    file(MAKE_DIRECTORY "${staging}")
    foreach (entry CMakeLists.txt LICENSE cmake common ggml include licenses scripts src tests tools vendor)
        if (EXISTS "${SOURCE}/${entry}")
            file(COPY "${SOURCE}/${entry}" DESTINATION "${staging}"
                PATTERN node_modules EXCLUDE
                PATTERN .git EXCLUDE)
        endif()
    endforeach()

    set(label "stock")
    if (PATCH_DIR)
        longrope_apply_series("${staging}" "${PATCH_DIR}")
    endif()

    file(GLOB_RECURSE wanted RELATIVE "${staging}" "${staging}/*")
    file(GLOB_RECURSE present RELATIVE "${DESTINATION}" "${DESTINATION}/*")
    list(REMOVE_ITEM present ${wanted})
    foreach (file IN LISTS present)
        file(REMOVE "${DESTINATION}/${file}")
    endforeach()
    foreach (file IN LISTS wanted)
        get_filename_component(folder "${DESTINATION}/${file}" DIRECTORY)
        file(MAKE_DIRECTORY "${folder}")
        file(COPY_FILE "${staging}/${file}" "${DESTINATION}/${file}" ONLY_IF_DIFFERENT)
    endforeach()
    file(REMOVE_RECURSE "${staging}")
    set(LONGROPE_PATCH_LABEL "${label}" PARENT_SCOPE)
endfunction()

# Sets `label` in the caller when there is anything to apply.
function(longrope_apply_series TREE PATCH_DIR)
    if (NOT EXISTS "${PATCH_DIR}/series")
        message(FATAL_ERROR "the list of patches ${PATCH_DIR}/series does not exist")
    endif()
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${PATCH_DIR}/series")
    file(STRINGS "${PATCH_DIR}/series" patches REGEX "^[^#]")
    list(TRANSFORM patches STRIP)
    list(FILTER patches EXCLUDE REGEX "^$")
    file(GLOB new_files CONFIGURE_DEPENDS "${PATCH_DIR}/src/*.cpp" "${PATCH_DIR}/src/*.h")

    set(hashes "")
    foreach (file IN LISTS new_files)
        get_filename_component(name "${file}" NAME)
        if (EXISTS "${TREE}/src/${name}")
            message(FATAL_ERROR "${file} would overwrite src/${name} of llama.cpp: rename it")
        endif()
        file(COPY "${file}" DESTINATION "${TREE}/src")
        file(SHA256 "${file}" hash)
        string(APPEND hashes "${name} ${hash}\n")
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
    endforeach()

    if (patches)
        find_program(LONGROPE_GIT git)
        find_program(LONGROPE_PATCH_PROGRAM patch)
        if (NOT LONGROPE_GIT AND NOT LONGROPE_PATCH_PROGRAM)
            message(FATAL_ERROR "neither git nor patch is installed, one is needed to apply ${PATCH_DIR}/series: apt install patch")
        endif()
    endif()
    get_filename_component(parent "${TREE}" DIRECTORY)
    foreach (name IN LISTS patches)
        set(file "${PATCH_DIR}/${name}")
        if (NOT EXISTS "${file}")
            message(FATAL_ERROR "${PATCH_DIR}/series names ${name}, which does not exist there")
        endif()
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
        file(SHA256 "${file}" hash)
        string(APPEND hashes "${name} ${hash}\n")
        if (LONGROPE_GIT)
            # without the ceiling, git takes the paths as relative to a repository around the
            # build folder and silently skips every file
            set(command "${CMAKE_COMMAND}" -E env --unset=GIT_DIR --unset=GIT_WORK_TREE
                "GIT_CEILING_DIRECTORIES=${parent}"
                "${LONGROPE_GIT}" apply -p1 --whitespace=nowarn "${file}")
        else()
            set(command "${LONGROPE_PATCH_PROGRAM}" -p1 --batch --forward --fuzz=0 -i "${file}")
        endif()
        execute_process(COMMAND ${command} WORKING_DIRECTORY "${TREE}"
            RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
        if (NOT status EQUAL 0)
            message(FATAL_ERROR
                "${name} does not apply to ${LLAMA_CPP_SOURCE_DIR}:\n${output}\n"
                "The series is made for the pinned version only. Use that one, build without the "
                "patches (--unpatched, -DLONGROPE_PATCH=OFF), or rebase them (cpp_patch/README.md).")
        endif()
        message(STATUS "applied ${name}")
    endforeach()

    if (hashes)
        string(SHA256 hash "${hashes}")
        string(SUBSTRING "${hash}" 0 8 hash)
        set(label "longrope-${hash}" PARENT_SCOPE)
    endif()
endfunction()
