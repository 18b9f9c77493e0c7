//! Does this kernel turn programs into machine code, and plainly? Interpreted or blinded they do the same, slower; and without a
//! compiler the kernel refuses some of them (calico 10602).

/// Where the kernel says it; only the machine's own network namespace shows these files.
const ENABLE: &str = "/proc/sys/net/core/bpf_jit_enable";
const HARDEN: &str = "/proc/sys/net/core/bpf_jit_harden";

/// What is wrong with it, in a sentence each.
pub fn jit_warnings() -> Vec<String> {
    let read = |path| std::fs::read_to_string(path).ok();
    judge(read(ENABLE).as_deref(), read(HARDEN).as_deref())
}

fn judge(enable: Option<&str>, harden: Option<&str>) -> Vec<String> {
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse::<u32>().ok());
    let mut warnings = Vec::new();
    if number(enable) == Some(0) {
        warnings.push(format!(
            "the kernel interprets its programs ({ENABLE} is 0): every packet costs several times what it could; \
             `sysctl net.core.bpf_jit_enable=1`, and start the gateway again"
        ));
    }
    // 1 is for programs of users without privileges, which ours are not (Documentation/admin-guide/sysctl/net.rst).
    if number(harden) == Some(2) {
        warnings.push(format!(
            "the kernel blinds the constants of every program ({HARDEN} is 2): packets cost more; 1 blinds those of \
             unprivileged users only"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_interprets_or_blinds_is_warned_of_and_one_that_does_not_say_is_not() {
        assert_eq!(judge(Some("1\n"), Some("0\n")), [""; 0]);
        assert_eq!(judge(Some("2\n"), Some("1\n")), [""; 0], "with its code in the log; hardened for others");
        assert_eq!(judge(None, None), [""; 0], "in a namespace of its own");
        assert_eq!(judge(Some("nonsense"), Some("")), [""; 0]);
        let off = judge(Some("0\n"), Some("0\n"));
        assert!(off.len() == 1 && off[0].contains("bpf_jit_enable=1"), "{off:?}");
        let hard = judge(Some("1\n"), Some("2\n"));
        assert!(hard.len() == 1 && hard[0].contains("blinds"), "{hard:?}");
        assert_eq!(judge(Some("0"), Some("2")).len(), 2);
    }
}
