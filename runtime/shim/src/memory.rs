//! Keeps an idle shim small: there is one for every pod of the machine.
//!
//! Two things are given back at rest: freed heap, and the pages of this program's own code and constants that start-up
//! and past requests have mapped. The latter are clean file pages: the next use maps them again from the page cache, for
//! some microseconds.
#![allow(unsafe_code, reason = "allocator settings and advice on the program's own mapping")]

use nix::libc;

/// Before anything is allocated: freed memory at the heap's top goes back soon, and there is only one heap.
pub(crate) fn tune() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes numbers only.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 32 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 4 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 * 1024);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Nothing has happened for a while.
pub(crate) fn rest() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number only.
    unsafe {
        libc::malloc_trim(0)
    };
    for (start, length) in read_only_segments() {
        // SAFETY: the segment is mapped from the program's file and not writable, so it holds nothing but the file's bytes,
        // and dropped pages read the same when touched again. Segments with relocated data are writable and left out.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// The loaded segments without write permission, in whole pages within each segment.
fn read_only_segments() -> impl Iterator<Item = (usize, usize)> {
    const PAGE: usize = 4096;
    // SAFETY: the kernel puts the address and number of the program headers there, mapped for the process's life; a
    // position independent program has none at this address, and then the count is zero.
    let headers: &[libc::Elf64_Phdr] = unsafe {
        let table = libc::getauxval(libc::AT_PHDR) as *const libc::Elf64_Phdr;
        let count = libc::getauxval(libc::AT_PHNUM) as usize;
        if table.is_null() { &[] } else { std::slice::from_raw_parts(table, count) }
    };
    // Only in a program loaded where it was linked to are these addresses the true ones.
    let fixed = headers.iter().any(|header| header.p_type == libc::PT_LOAD && header.p_vaddr != 0)
        && !headers.iter().any(|header| header.p_type == libc::PT_LOAD && header.p_vaddr == 0);
    headers
        .iter()
        .filter(move |header| fixed && header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0)
        .filter_map(|header| {
            let start = (header.p_vaddr as usize).next_multiple_of(PAGE);
            let end = (header.p_vaddr as usize + header.p_filesz as usize) / PAGE * PAGE;
            (end > start).then(|| (start, end - start))
        })
}
