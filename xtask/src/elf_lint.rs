//! Looks at a linked BPF object for what the kernel would reject later, with a message nobody understands.
//!
//! A reachable panic (an index, an `unwrap`, a checked division) links without complaint and fails at load as "last
//! insn is not an exit or jmp" with nothing verified. An undefined symbol fails in the loader. Both show in the
//! symbol table, so the build stops here and names the program that gets there.

use std::{collections::HashMap, fmt, path::Path};

use anyhow::{Context as _, bail};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SectionKind,
    SymbolKind,
};

/// Kernel functions that programs call and the loader resolves; anything else undefined is a mistake.
const KFUNCS: [&str; 0] = [];

/// One defect of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A panic function made it into the object.
    Panic {
        symbol: String,
        /// From a program down to the panic; empty where the calls could not be followed.
        chain: Vec<String>,
    },
    /// A symbol that nothing defines.
    Undefined { symbol: String },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panic { symbol, chain } => {
                match chain.split_first() {
                    Some((program, rest)) => {
                        write!(f, "a panic is reachable from {program}: {program} -> {}", rest.join(" -> "))?;
                    }
                    None => write!(f, "the object contains the panic function {symbol}")?,
                }
                f.write_str(" (use .get(), let-else or a wrapping operation where it may panic)")
            }
            Self::Undefined { symbol } => write!(f, "{symbol} is called or read but nothing defines it"),
        }
    }
}

/// Fails with every finding in the object at this path.
pub fn check(object: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let findings = lint(&bytes).with_context(|| format!("{} is not an object file", object.display()))?;
    if findings.is_empty() {
        return Ok(());
    }
    let list: String = findings.iter().map(|finding| format!("\n  {finding}")).collect();
    bail!("the kernel would not load {}:{list}", object.display())
}

/// What is wrong with this object, if anything.
pub fn lint(bytes: &[u8]) -> anyhow::Result<Vec<Finding>> {
    let file = object::File::parse(bytes)?;
    let calls = Calls::of(&file);
    let mut findings = Vec::new();
    for symbol in file.symbols() {
        let Ok(name) = symbol.name() else { continue };
        if name.is_empty() || KFUNCS.contains(&name) {
            continue;
        }
        // Undefined comes second: a panic function nobody defined is still, above all, a panic.
        if name.contains("panicking") {
            findings.push(Finding::Panic { symbol: name.to_owned(), chain: calls.chain_to(name) });
        } else if symbol.is_undefined() {
            findings.push(Finding::Undefined { symbol: name.to_owned() });
        }
    }
    Ok(findings)
}

/// Who calls whom in a BPF object, by symbol name.
#[derive(Default)]
struct Calls {
    /// Entry points: functions in sections with a program type's name ("xdp", "classifier"). What they call lives in
    /// ".text", or ".text.unlikely" and the like where core puts what it hopes never to reach.
    programs: Vec<String>,
    callees: HashMap<String, Vec<String>>,
}

/// BPF's call instruction, and in its source register the mark of a call to another BPF function.
const CALL: u8 = 0x85;
const PSEUDO_CALL: u8 = 1;

impl Calls {
    fn of(file: &object::File<'_>) -> Self {
        let mut calls = Self::default();
        if file.architecture() != object::Architecture::Bpf {
            return calls;
        }
        // Functions by section, to tell which one an offset is in.
        let mut functions: HashMap<SectionIndex, Vec<(u64, &str)>> = HashMap::new();
        for symbol in file.symbols() {
            if let (SymbolKind::Text, Some(section), Ok(name)) =
                (symbol.kind(), symbol.section_index(), symbol.name())
            {
                functions.entry(section).or_default().push((symbol.address(), name));
            }
        }
        functions.values_mut().for_each(|list| list.sort_unstable());
        let function_at = |section: SectionIndex, offset: u64| {
            let list = functions.get(&section)?;
            list.iter().rev().find(|(start, _)| *start <= offset).map(|(_, name)| *name)
        };

        for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
            if !section.name().is_ok_and(|name| name.starts_with(".text")) {
                let here = functions.get(&section.index()).into_iter().flatten();
                calls.programs.extend(here.map(|(_, name)| (*name).to_owned()));
            }
            let targets: HashMap<u64, RelocationTarget> =
                section.relocations().map(|(offset, relocation)| (offset, relocation.target())).collect();
            let Ok(code) = section.data() else { continue };
            for (offset, instruction) in (0u64..).step_by(8).zip(code.chunks_exact(8)) {
                let [opcode, registers, _, _, i0, i1, i2, i3] = *instruction else { continue };
                if opcode != CALL || registers >> 4 != PSEUDO_CALL {
                    continue;
                }
                let immediate = i64::from(i32::from_le_bytes([i0, i1, i2, i3]));
                // A call counts instructions, from the one after it.
                let relative = |base: u64| base.checked_add_signed((immediate + 1) * 8);
                let callee = match targets.get(&offset) {
                    // Within a section the assembler resolves the call itself.
                    None => relative(offset).and_then(|target| function_at(section.index(), target)),
                    Some(RelocationTarget::Symbol(index)) => {
                        file.symbol_by_index(*index).ok().and_then(|symbol| match symbol.kind() {
                            SymbolKind::Section => function_at(symbol.section_index()?, relative(0)?),
                            _ => symbol.name().ok(),
                        })
                    }
                    Some(_) => None,
                };
                if let (Some(caller), Some(callee)) = (function_at(section.index(), offset), callee) {
                    calls.callees.entry(caller.to_owned()).or_default().push(callee.to_owned());
                }
            }
        }
        calls
    }

    /// The shortest way from a program to this function, both included.
    fn chain_to(&self, wanted: &str) -> Vec<String> {
        let mut chains: Vec<Vec<&str>> = self.programs.iter().map(|program| vec![program.as_str()]).collect();
        let mut seen: Vec<&str> = Vec::new();
        while !chains.is_empty() {
            let mut longer = Vec::new();
            for chain in chains {
                let Some(&last) = chain.last() else { continue };
                if last == wanted {
                    return chain.into_iter().map(str::to_owned).collect();
                }
                for callee in self.callees.get(last).into_iter().flatten() {
                    if !seen.contains(&callee.as_str()) {
                        seen.push(callee);
                        longer.push(chain.iter().copied().chain([callee.as_str()]).collect());
                    }
                }
            }
            chains = longer;
        }
        Vec::new()
    }
}

#[cfg(test)]
#[path = "elf_lint_tests.rs"]
mod tests;
